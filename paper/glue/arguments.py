"""The flags of the paper's GLUE programs, with their meaning and their defaults."""

# ruff: noqa: RUF009 - `_says` makes a dataclass field

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import HfArgumentParser, TrainingArguments

from dsee_scale.config import DecompositionPreset, Score
from dsee_scale.errors import ConfigError
from paper.glue.metrics import TASKS
from paper.glue.old_flags import modern_words

SparseMethod = Literal["grebsmo", "omp", "rp"]
ExportDelta = Literal["dense", "masked", "none"]
SUPPORTS = {"grebsmo": "grebsmo", "omp": "magnitude", "rp": "random"}


def _says(text: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """Which model, and what is put into it."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub id or folder of the model, or the output folder of an earlier run of this program."
        }
    )
    base_model_name_or_path: str | None = _says("The pretrained model under a tuned one, if it was moved.")
    config_name: str | None = _says("Configuration, if not the model's.")
    tokenizer_name: str | None = _says("Tokenizer, if not the model's.")
    cache_dir: str | None = _says("Where downloads are kept.")
    model_revision: str = _says("Branch, tag or commit on the hub.", "main")
    use_token: bool = _says("Use the hub token of `hf auth login`.", False)
    cls_dropout: float | None = _says("Dropout before the classifier, if not the model's.")
    apply_lora: bool = _says(
        "Train low-rank updates and the head; without it all weights are trained.", False
    )
    lora_r: int = _says("Rank R.", 4)
    lora_alpha: float = _says("Scaling numerator: the update is multiplied by alpha / rank.", 32)
    lora_path: str | None = _says("Folder of a saved adapter to go on from.")
    lora_target_modules: list[str] | None = _says("Modules to adapt, if not query and value.")
    apply_sparse: bool = _says("Train a sparse residual besides (needs --apply_lora).", False)
    num_sparse: int = _says("Entries N of each sparse residual.", 128)
    sparse_method: SparseMethod = _says(
        "How their positions are chosen: decomposition, largest weights, or at random.", "grebsmo"
    )
    grebsmo_preset: DecompositionPreset = _says(
        "`fast`: a small rank and a relative threshold; `reference`: the repository's own loop.", "fast"
    )


@dataclass
class PruningArguments:
    """What is set to zero before training."""

    pruning_ratio: float = _says("Fraction removed of the matrices without an update.", 0.0)
    ad_pruning_ratio: float = _says("Fraction removed of the matrices with an update.", 0.0)
    prune_mode: Score = _says("Score of the matrices with an update, and of heads.", "WABS")
    prune_heads_num: int = _says("Attention heads removed from every layer.", 0)
    export_delta: ExportDelta = _says(
        "How the update is put into the exported folder OUTPUT/model: `dense` gives the evaluated model, `masked` "
        "drops the update at removed weights, `none` exports nothing.",
        "dense",
    )

    @property
    def prunes(self) -> bool:
        """Whether anything is to be removed."""
        return bool(self.pruning_ratio or self.ad_pruning_ratio or self.prune_heads_num)


@dataclass
class DataArguments:
    """Which examples."""

    task_name: str | None = _says("GLUE task: " + ", ".join(TASKS) + ".")
    dataset_name: str | None = _says("Another data set of the hub.")
    dataset_config_name: str | None = _says("Its configuration.")
    max_seq_length: int = _says("Tokens of an example; longer ones are cut.", 128)
    pad_to_max_length: bool = _says("Pad to max_seq_length, not to the longest example of a batch.", True)
    max_train_samples: int | None = _says("Use so many training examples.")
    max_eval_samples: int | None = _says("Use so many validation examples.")
    max_predict_samples: int | None = _says("Use so many test examples.")
    train_file: str | None = _says("Local .csv, .tsv, .json or .jsonl file with the training examples.")
    validation_file: str | None = _says("The same with the validation examples.")
    test_file: str | None = _says("The same with the test examples.")
    overwrite_output_dir: bool = _says("Start afresh in an output folder that holds an earlier run.", False)


@dataclass(frozen=True)
class GlueSettings:
    """One run's flags.

    Attributes:
        model, pruning, data: as given.
        training: TrainingArguments that were given, under their own names.
        given: names of all flags that were given.
    """

    model: ModelArguments
    pruning: PruningArguments
    data: DataArguments
    training: dict[str, Any]
    given: frozenset[str]


def make_parser() -> HfArgumentParser:
    """All flags, TrainingArguments' included."""
    return HfArgumentParser(
        (ModelArguments, PruningArguments, DataArguments, TrainingArguments),  # type: ignore[arg-type]
        description="Tune an encoder on GLUE, or on files of the same shape, with DSEE.",
        allow_abbrev=False,
    )


def parse_flags(argv: Sequence[str]) -> GlueSettings:
    """Read a command line; old names are understood.

    Raises:
        ConfigError: flags that contradict each other.
    """
    parser, argv = make_parser(), modern_words(argv)
    given = frozenset(word[2:] for word in argv if word.startswith("--"))
    found = vars(parser.parse_args(argv))
    parts = [
        kind(**{f.name: found[f.name] for f in dataclasses.fields(kind)})
        for kind in (ModelArguments, PruningArguments, DataArguments)
    ]
    training = {
        f.name: found[f.name] for f in dataclasses.fields(TrainingArguments) if f.name in given and f.init
    }
    settings = GlueSettings(parts[0], parts[1], parts[2], training, given)  # type: ignore[arg-type]
    problems = [*_data_problems(settings.data, training), *_method_problems(settings)]
    if problems:
        raise ConfigError("; ".join(problems))
    return settings


def _data_problems(data: DataArguments, training: dict[str, Any]) -> list[str]:
    problems = []
    if data.task_name is not None:
        data.task_name = data.task_name.lower()
        if data.task_name not in TASKS:
            problems.append(f"--task_name {data.task_name!r} is unknown; valid: {', '.join(TASKS)}")
    files = [name for name in (data.train_file, data.validation_file, data.test_file) if name]
    if not files and data.task_name is None and data.dataset_name is None:
        problems.append("no data: give --task_name, --dataset_name, or --train_file and --validation_file")
    if files:
        wanted = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
        problems += [
            f"--{flag} needs --{name}"
            for flag, name in wanted.items()
            if training.get(flag) and getattr(data, name) is None
        ]
        if data.dataset_name is not None:
            problems.append("give --dataset_name or files, not both")
    if not any(training.get(flag) for flag in ("do_train", "do_eval", "do_predict")):
        problems.append("nothing to do: give --do_train, --do_eval or --do_predict")
    if not training.get("output_dir"):
        problems.append("--output_dir is missing: name the run's folder")
    return problems


def _method_problems(settings: GlueSettings) -> list[str]:
    model, pruning, problems = settings.model, settings.pruning, []
    for name in ("pruning_ratio", "ad_pruning_ratio"):
        if not 0 <= getattr(pruning, name) < 1:
            problems.append(f"--{name} must lie in [0, 1), found {getattr(pruning, name)}")
    if pruning.prune_heads_num < 0:
        problems.append(f"--prune_heads_num must be at least 0, found {pruning.prune_heads_num}")
    if pruning.prune_mode not in get_args(Score):
        problems.append(
            f"--prune_mode {pruning.prune_mode!r} is unknown; valid: {', '.join(get_args(Score))}"
        )
    if model.num_sparse < 0 or model.lora_r < 1 or model.lora_alpha <= 0:
        problems.append("--lora_r must be at least 1, --lora_alpha positive, --num_sparse at least 0")
    return problems
