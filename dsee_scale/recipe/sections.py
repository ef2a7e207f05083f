"""The sections of a recipe beside DSEEConfig, PruneConfig and TrainingArguments.

The line under each field is its only documentation; `--help` and the docs are made from it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from dsee_scale.export.card import HUB_ID
from dsee_scale.export.writer import DeltaForm
from dsee_scale.settings import JsonConfig, at_least, unknown_keys

Task = Literal["language_modelling", "completion", "classification", "chat"]
AdapterFormat = Literal["dsee", "peft"]
DType = Literal["float32", "bfloat16", "float16"]

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)

EXTRA = "pip install 'dsee_scale[quant]'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(JsonConfig):
    """The pretrained decoder."""

    name: str
    """Hub id, or folder with a `config.json`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own when absent."""
    dtype: DType | None = None
    """How base weights are held; when absent it follows `training.bf16` and `training.fp16`, else float32."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; transformers' choice when absent."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    quantization: Mapping[str, Any] | None = None
    """Arguments of transformers' BitsAndBytesConfig: `{load_in_4bit: true, bnb_4bit_quant_type: nf4}` or
    `{load_in_8bit: true}`; the compute dtype follows the model's when absent."""

    def problems(self) -> list[str]:
        """What is wrong across fields."""
        return [] if self.quantization is None else _quantization_problems(self.quantization)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(JsonConfig):
    """Where examples come from and how one becomes tokens."""

    task: Task
    """`language_modelling` (text in blocks), `completion` (prompt, then an answer), `classification`, or `chat`
    (conversations in the tokenizer's chat template; only the assistant's turns are learned)."""
    dataset: str | None = None
    """Hub id or folder for `datasets.load_dataset`; instead of the two files."""
    dataset_config: str | None = None
    """Name of the dataset's configuration, e.g. `wikitext-2-raw-v1`."""
    train_split: str = "train"
    """Split of `dataset` to train on."""
    validation_split: str | None = "validation"
    """Split of `dataset` to evaluate on; null takes `validation_fraction` of the training split."""
    train_file: str | None = None
    """Local .csv, .tsv, .json, .jsonl, .parquet or .txt file."""
    validation_file: str | None = None
    """The same for evaluation; when absent `validation_fraction` of the training file."""
    validation_fraction: float = 0.1
    """Share of the training rows held out when no validation rows are named, in (0, 1)."""
    split_seed: int = 0
    """Seed of that split and of the subsets below."""
    text_column: str = "text"
    """Column with the text, for `language_modelling`."""
    messages_column: str = "messages"
    """Column with a list of `{role, content}`, for `chat`."""
    separator: str | None = None
    """Text between rows of `language_modelling`; when absent the end-of-text token, each row a document."""
    prompt: str | None = None
    """Template of the prompt, columns in braces: `"Review: {text}\\nSentiment:"`. An empty prompt is the
    tokenizer's begin-of-text token, or its end-of-text token if it has none."""
    completion: str | None = None
    """Template of the text to learn, for `completion`: `" {ref}"`."""
    label_column: str = "label"
    """Column with the class, for `classification`."""
    labels: Mapping[str | int, str] = dataclasses.field(default_factory=dict)
    """Class -> the string that the model should answer: `{positive: " positive"}`."""
    max_length: int = 512
    """Tokens per example; longer prompts lose their beginning, longer chats their end. The block size for
    `language_modelling`, into which documents are packed one after the other."""
    max_train_samples: int | None = None
    """Use a random subset of this many training rows."""
    max_eval_samples: int | None = None
    """Use a random subset of this many validation rows."""
    calibration_samples: int = 256
    """Training rows whose activations a pruning looks at (score `wanda`, `refit`), over all ranks together."""
    num_workers: int = 1
    """Processes that tokenize."""
    generate_samples: int = 0
    """Prompts to complete in each evaluation, scored by BLEU against their references; 0 for none."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `generate`, e.g. `{max_new_tokens: 64, num_beams: 4}`."""

    def problems(self) -> list[str]:
        """What is wrong across fields."""
        found = []
        if (self.dataset is None) == (self.train_file is None):
            found.append("name exactly one of dataset (hub id) and train_file (local)")
        if self.dataset is not None and self.validation_file is not None:
            found.append("validation_file goes with train_file; use validation_split with dataset")
        if self.task == "chat" and self.prompt:
            found.append("task 'chat' takes its form from the chat template; leave prompt out")
        if self.task in ("completion", "classification") and not self.prompt:
            found.append(
                f'task {self.task!r} needs a prompt template, e.g. prompt: "Review: {{text}}\\nSentiment:"'
            )
        if (self.task == "completion") != bool(self.completion):
            found.append("completion goes with task 'completion', and only with it")
        if (self.task == "classification") != bool(self.labels):
            found.append(
                "labels go with task 'classification', and only with it: {negative: \" negative\", ...}"
            )
        if len({str(key) for key in self.labels}) != len(self.labels):
            found.append(f"labels name a class twice, as text and as a number: {dict(self.labels)}")
        if len(self.labels) == 1 or len(set(self.labels.values())) != len(self.labels):
            found.append(f"labels need at least two different strings, found {dict(self.labels)}")
        if not all(self.labels.values()):
            found.append(
                f"labels must not be empty, as a model would have nothing to say: {dict(self.labels)}"
            )
        if self.generate_samples and self.task != "completion":
            found.append("generate_samples goes with task 'completion'")
        if not 0 < self.validation_fraction < 1:
            found.append(f"validation_fraction must lie in (0, 1), found {self.validation_fraction!r}")
        found += at_least(self, 2, "max_length")
        return found + at_least(
            self, 1, "max_train_samples", "max_eval_samples", "calibration_samples", "num_workers"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetuneConfig(JsonConfig):
    """Training after pruning.

    The learning rate continues along `training`'s schedule, which then spans both phases; after a pruning at twice
    the rate, but never beyond `training`'s peak. If any of its settings is given here, retune has its own schedule,
    with the other settings taken from `training`.
    """

    max_steps: int | None = None
    """Optimizer steps; or give epochs."""
    num_train_epochs: float | None = None
    """Passes over the training rows; used when max_steps is absent."""
    learning_rate: float | None = None
    """Peak learning rate of this phase."""
    warmup_steps: float | None = None
    """Warm-up steps of this phase; below 1, a fraction of it."""
    lr_scheduler_type: str | None = None
    """Name of the decay, as in TrainingArguments."""
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    """Its other arguments, as in TrainingArguments."""

    def problems(self) -> list[str]:
        """What is wrong across fields."""
        length = self.max_steps if self.max_steps is not None else self.num_train_epochs
        if length is None or length <= 0:
            return ["give max_steps or num_train_epochs above 0, or leave the section out"]
        if self.lr_scheduler_type is not None and self.lr_scheduler_type not in SCHEDULES:
            return [
                f"lr_scheduler_type {self.lr_scheduler_type!r} is unknown here; valid: {', '.join(SCHEDULES)}"
            ]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(JsonConfig):
    """The Hugging Face folder that the run leaves."""

    delta: DeltaForm = "masked"
    """`masked`: (W + D) * M, as sparse as W; `dense`: W * M + D; `separate`: sparse W, adapter beside it."""
    adapter_format: AdapterFormat = "dsee"
    """With delta `separate`: `dsee`, or `peft`, a LoRA folder for PEFT and vLLM with the pruned base in `base`."""
    check: bool = True
    """Reload the folder in stock transformers, without dsee_scale, and compare quality and logits."""
    push_to_hub: str | None = None
    """OWNER/NAME: upload the folder once it is checked, in one commit, as `dsee-scale push` does."""

    def problems(self) -> list[str]:
        """What is wrong across fields."""
        found = []
        if self.adapter_format == "peft" and self.delta != "separate":
            found.append(f"adapter_format 'peft' goes with delta 'separate', found {self.delta!r}")
        if self.push_to_hub is not None and not HUB_ID.fullmatch(self.push_to_hub):
            found.append(f"push_to_hub {self.push_to_hub!r} is not OWNER/NAME")
        if self.push_to_hub is not None and self.delta == "separate":
            found.append(
                "push_to_hub uploads whole models, and delta 'separate' leaves an adapter on a base of this machine: "
                "push both after the run (`dsee-scale push FOLDER OWNER/NAME --base OWNER/BASE`)"
            )
        return found


def _quantization_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arguments of a BitsAndBytesConfig, one sentence each."""
    from transformers import BitsAndBytesConfig

    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    found = [f"quantization: {problem}" for problem in unknown_keys(values, known)]
    if bool(values.get("load_in_4bit")) == bool(values.get("load_in_8bit")):
        found.append("quantization: set one of load_in_4bit and load_in_8bit to true")
    kind = values.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        found.append(f"quantization: bnb_4bit_quant_type {kind!r} is unknown; valid: nf4, fp4")
    if values.get("llm_int8_has_fp16_weight"):
        found.append("quantization: llm_int8_has_fp16_weight keeps 16-bit weights; leave it out")
    if find_spec("bitsandbytes") is None:
        found.append(f"quantization needs bitsandbytes, which is not installed: {EXTRA}")
    return found
