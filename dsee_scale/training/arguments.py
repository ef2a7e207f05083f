"""TrainingArguments from a recipe, checked against DeepSpeed's config."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dsee_scale.errors import ConfigError
from dsee_scale.training.cpu_processes import start_deepspeed_on_cpu
from dsee_scale.training.deepspeed_check import check_deepspeed_config
from dsee_scale.training.recipe import Recipe


class RunArguments(TrainingArguments):
    """TrainingArguments that let bf16 run under DeepSpeed on the CPU.

    transformers 5.23 wants `use_cpu` for bf16 without a GPU, and `use_cpu` keeps DeepSpeed away.
    """

    def _validate_args(self) -> None:
        bf16 = self.bf16
        self.bf16 = bf16 and torch.cuda.is_available()
        super()._validate_args()
        self.bf16 = bf16


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's arguments; see `make_arguments`."""
    return make_arguments(dict(recipe.training))


def make_arguments(values: dict[str, Any]) -> TrainingArguments:
    """TrainingArguments from plain values; making them starts the process group.

    Keep the result alive: it holds the DeepSpeed config by which `from_pretrained` partitions weights while
    it loads them.

    Args:
        values: arguments that were given; changed in place.

    Raises:
        ConfigError: arguments that contradict each other or the DeepSpeed config.
    """
    if not values.get("output_dir"):
        raise ConfigError("training.output_dir is missing; name the run's folder, e.g. runs/sentiment")
    values.pop("resume_from_checkpoint", None)
    values.setdefault("remove_unused_columns", False)
    with_deepspeed = _reject_two_configs(values)
    if not torch.cuda.is_available():
        if with_deepspeed:
            start_deepspeed_on_cpu(values)
        else:
            values.setdefault("use_cpu", True)
    try:
        args = RunArguments(**values)
    except (ValueError, OSError) as error:
        raise ConfigError(f"training: {error}") from error
    if args.learning_rate <= 0:
        raise ConfigError(f"training.learning_rate must be positive, found {args.learning_rate}")
    plugin = args.deepspeed_plugin
    if plugin is not None:
        source = args.deepspeed if isinstance(args.deepspeed, str) else "the DeepSpeed config"
        given = _read_config(args.deepspeed) if args.deepspeed else plugin.hf_ds_config.config
        check_deepspeed_config(given, args, f"{source} (DeepSpeed)")
    return args


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """Restore accelerate's variables at the end.

    Accelerate notes what it was told in ACCELERATE_* variables and leaves them there; the next run in this
    process would take them for a launcher's.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ.update(before)


def model_dtype(recipe: Recipe, args: TrainingArguments) -> torch.dtype:
    """How base weights are held."""
    named = recipe.model.dtype or ("bfloat16" if args.bf16 else "float16" if args.fp16 else "float32")
    return getattr(torch, named)


def _reject_two_configs(values: dict[str, Any]) -> bool:
    """Whether DeepSpeed runs. What `accelerate launch` brings must be the recipe's config, if it has one."""
    named = values.get("deepspeed")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return named is not None
    brought = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    values.pop("deepspeed", None)
    if named is not None and brought.lower() == "none":
        raise ConfigError(
            f"training.deepspeed names {named}, but accelerate's config sets DeepSpeed up by itself; "
            "give it a deepspeed_config_file with that path, or pass --deepspeed null"
        )
    if named is not None and _read_config(named) != _read_config(brought):
        raise ConfigError(
            f"training.deepspeed names {named}, but accelerate's config names {brought}, which says "
            "something else; pass --deepspeed null to use accelerate's"
        )
    return True


def _read_config(source: Any) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    try:
        config = json.loads(Path(source).read_text())
    except OSError as error:
        raise ConfigError(f"DeepSpeed config {source} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"DeepSpeed config {source} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"DeepSpeed config {source} holds a {type(config).__name__}, expected a JSON object"
        )
    return config
