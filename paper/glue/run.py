"""One run of the GLUE program: load, adapt, prune, train, evaluate, predict, export."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.distributed import from_rank0, log_rank0, raise_first, raise_on_all_ranks, rank
from dsee_scale.errors import ConfigError, DSEEError, FormatError
from dsee_scale.export.export import export_model
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.training.journal import Journal, count_zeros, sparsity
from dsee_scale.training.setup import kept_environment, make_arguments
from dsee_scale.training.survival import (
    existing,
    limited_waiting,
    newest_first,
    report_lost_rank,
    verify_share,
)
from paper.glue.arguments import GlueSettings
from paper.glue.data import GlueData, encode, load_glue
from paper.glue.metrics import compute_metrics, decide, metric_of
from paper.glue.model import (
    Source,
    adapt,
    find_source,
    is_plain,
    load_config,
    load_model,
    load_tokenizer,
    prune_model,
)
from paper.glue.trainer import GlueTrainer, Progress

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
RESUME = "the same command without --overwrite_output_dir goes on from the last checkpoint"
NEEDED = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}


def run_glue(settings: GlueSettings) -> Path:
    """Collective. Do what the flags say, under any launcher or none.

    Returns:
        The output folder: `adapter/` (or, without adapters, the model itself), `checkpoint-STEP/`, `model/`
        (plain Hugging Face files), `all_results.json`, `predict_results_TASK.txt`.

    Raises:
        DSEEError: bad flags, data or files; the same on every rank, before any training.
        RunStoppedError: on each rank that is left, that another rank is lost.
    """
    values = dict(settings.training)
    asked = values.pop("resume_from_checkpoint", None)
    with kept_environment():
        args, journal = make_arguments(values), Journal()
        lost = report_lost_rank(journal, args.ddp_timeout, RESUME)
        with limited_waiting(args.ddp_timeout), lost:
            return _run(settings, args, asked, journal)


def _run(settings: GlueSettings, args: TrainingArguments, asked: str | None, journal: Journal) -> Path:
    output = Path(str(args.output_dir))
    checkpoint = _checkpoint(settings, args, asked)
    with raise_on_all_ranks(what="reading the tuned model"):
        source = find_source(settings, checkpoint)
    with raise_on_all_ranks(what="reading the data"):
        wanted = [part for flag, part in NEEDED.items() if getattr(args, flag)]
        data = load_glue(settings.data, wanted, source.classes)
    journal.doing = "loading"
    trainer, rows = _trainer(settings, args, source, data, journal, fresh=checkpoint is None)
    if args.do_train:
        journal.doing = "training"
        _train(trainer, rows["train"], checkpoint)
        journal.doing = "export"
        if isinstance(trainer, GlueTrainer) and settings.pruning.export_delta != "none":
            export_model(
                trainer.model_wrapped,
                output / MODEL_FOLDER,
                delta=settings.pruning.export_delta,
                tokenizer=trainer.processing_class,
                overwrite=True,
            )
    if args.do_eval:
        journal.doing = "evaluation"
        _evaluate(trainer, rows)
    if args.do_predict:
        journal.doing = "prediction"
        _predict(trainer, rows, data, output)
    raise_first(None)  # nobody leaves before all are done
    return output


def _checkpoint(settings: GlueSettings, args: TrainingArguments, asked: str | None) -> Path | None:
    """Collective. Where to go on: what is asked for, or the newest whole checkpoint of those that rank 0 sees."""
    output, what = Path(str(args.output_dir)), "looking at the output folder"
    if asked:
        with raise_on_all_ranks(what=what):
            return existing(Path(asked))
    if settings.data.overwrite_output_dir or not args.do_train:
        return None
    with raise_on_all_ranks(what=what):
        seen = newest_first(output)
    found = from_rank0(seen)
    if found:
        return _newest_whole(settings, found)
    with raise_on_all_ranks(what=what):
        _check_empty(output)
    return None


def _newest_whole(settings: GlueSettings, found: list[Path]) -> Path:
    """Collective. The first of these checkpoints that is whole on every rank."""
    problem: DSEEError | None = None
    for folder in found:
        try:
            with raise_on_all_ranks(what=f"reading {folder}"):
                _verify(settings, folder)
        except DSEEError as error:
            log_rank0(logger, "%s cannot be used: %s; trying the one before", folder, error)
            problem = problem or error
        else:
            log_rank0(logger, "going on from %s; --overwrite_output_dir would start afresh", folder)
            return folder
    raise FormatError(
        f"no checkpoint in {found[0].parent} is whole, and --overwrite_output_dir would start afresh; the newest "
        f"one: {problem}"
    )


def _verify(settings: GlueSettings, folder: Path) -> None:
    """Local. The Trainer's own checkpoints have no hashes; the file that it writes last says that they are whole."""
    if not is_plain(settings, folder):
        verify_share(folder)
    elif not (folder / TRAINER_STATE_NAME).is_file():
        raise FormatError(f"{folder} holds no {TRAINER_STATE_NAME}; it was cut off while it was written")


def _check_empty(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"output folder {output} is not empty; choose another --output_dir, or --overwrite_output_dir"
        )


def _trainer(
    settings: GlueSettings,
    args: TrainingArguments,
    source: Source,
    data: GlueData,
    journal: Journal,
    *,
    fresh: bool,
) -> tuple[Trainer, dict[str, Dataset]]:
    """Collective. Everything that stands before training, and the encoded rows."""

    with raise_on_all_ranks(what="reading the model's config and the data"):
        tokenizer = load_tokenizer(settings, source)
        config = load_config(settings, source, data.classes, tokenizer)
        classes = [config.id2label[index] for index in range(len(data.classes))]
        length = min(settings.data.max_seq_length, tokenizer.model_max_length)
        rows = encode(data, tokenizer, classes, length=length, pad=settings.data.pad_to_max_length)
    set_seed(args.seed)
    model = load_model(settings, source, config, dtype_of(args))
    adapt(model, settings, source, args.seed)
    if fresh:
        prune_model(model, settings)
    _clear_output(settings, args, fresh=fresh)
    if settings.data.pad_to_max_length:
        collator: Any = default_data_collator
    else:
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 else None)
    kind = partial(GlueTrainer, journal=journal) if adapted_layers(model) else Trainer
    positive = config.label2id[data.classes[1]] if len(data.classes) > 1 else 1
    metric = metric_of(data.task, regression=data.regression, positive=positive)
    trainer = kind(
        model=model,  # type: ignore[arg-type]
        args=args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        compute_metrics=compute_metrics(metric, regression=data.regression),
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[Progress(journal)],
    )
    # The model's loss is a mean over the batch, which the Trainer divides by the accumulated batches.
    trainer.model_accepts_loss_kwargs = False
    return trainer, rows


def _clear_output(settings: GlueSettings, args: TrainingArguments, *, fresh: bool) -> None:
    """Checkpoints of an overwritten run would be taken for this one's."""
    overwritten = fresh and args.do_train and settings.data.overwrite_output_dir
    with raise_on_all_ranks(what="clearing the output folder"):
        if overwritten and rank() == 0:
            for folder in Path(str(args.output_dir)).glob("checkpoint-*"):
                shutil.rmtree(folder)


def _train(trainer: Trainer, rows: Dataset, checkpoint: Path | None) -> None:
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    matrices = count_zeros(trainer.model_wrapped)
    metrics = {
        **result.metrics,
        "train_samples": len(rows),
        **_counts(trainer.model_wrapped),
        "block_weights_zero": sum(zeros for zeros, _ in matrices.values()),
        "block_sparsity": sparsity(matrices),
    }
    _report(trainer, "train", metrics)
    trainer.save_state()


def _counts(model: nn.Module) -> dict[str, int]:
    """Trained values as the paper counts them: of the updates, and of what is trained in full."""
    module, partition = unwrap(model), open_partition(model)
    sizes = {name: partition.shape(p).numel() for name, p in module.named_parameters() if p.requires_grad}
    updates = sum(size for name, size in sizes.items() if is_adapter_key(name))
    return {"trained_in_updates": updates, "trained_in_full": sum(sizes.values()) - updates}


def _evaluate(trainer: Trainer, rows: dict[str, Dataset]) -> None:
    metrics: dict[str, Any] = trainer.evaluate(rows["validation"])
    metrics["eval_samples"] = len(rows["validation"])
    if "validation_mm" in rows:
        metrics |= {f"{key}_mm": value for key, value in trainer.evaluate(rows["validation_mm"]).items()}
    _report(trainer, "eval", metrics)


def _predict(trainer: Trainer, rows: dict[str, Dataset], data: GlueData, output: Path) -> None:
    """Collective. One file for each test set, in the repository's format."""
    for part in (name for name in rows if name.startswith("test")):
        logits = trainer.predict(rows[part], metric_key_prefix="predict").predictions
        path = output / f"predict_results_{data.task}{'-mm' if part.endswith('_mm') else ''}.txt"
        with raise_on_all_ranks(what=f"writing {path}"):
            if trainer.is_world_process_zero():
                names: Any = trainer.model.config.id2label  # type: ignore[union-attr]
                write_predictions(path, logits, data.regression, names)


def write_predictions(path: Path, logits: Any, regression: bool, names: dict[int, str]) -> None:
    """Write `index<TAB>prediction` lines: values with three decimals, or class names. Local."""
    found: np.ndarray = decide(logits, regression=regression)
    words = [f"{value:3.3f}" if regression else names[int(value)] for value in found]
    lines = ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text("\n".join(lines) + "\n")
    draft.replace(path)


def _report(trainer: Trainer, split: str, metrics: dict[str, Any]) -> None:
    """Collective. Rank 0 logs and writes them."""
    with raise_on_all_ranks(what=f"writing the results of {split}"):
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)


def dtype_of(args: TrainingArguments) -> torch.dtype:
    """How weights are held: in half precision only where DeepSpeed keeps float32 masters, else autocast has to do."""
    if args.deepspeed_plugin is None:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
