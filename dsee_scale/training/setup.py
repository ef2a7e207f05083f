"""TrainingArguments from a recipe, checked against DeepSpeed's config."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from dsee_scale.checkpoint.folder import open_if_saved
from dsee_scale.data.tokenizer import check_vocabulary, open_tokenizer
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.partition.quantized import prepare_quantised
from dsee_scale.partition.zero_config import misspelt_keys, zero_problems
from dsee_scale.pretrained import hub_options, read_config
from dsee_scale.recipe.checks import check_deepspeed_config, set_direction
from dsee_scale.recipe.parsing import find_file
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.recipe.sections import ModelConfig

LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
"""One of these is set where a launcher, or MPI, started the process."""


class RunArguments(TrainingArguments):
    """TrainingArguments that let bf16 run under DeepSpeed on the CPU, and one process train on one GPU.

    transformers 5.23 wants `use_cpu` for bf16 without a GPU, and `use_cpu` keeps DeepSpeed away. Of one process without
    a launcher it makes a `DataParallel` over all GPUs in sight, which has other batches and another loss.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, one at most."""
        return min(1, int(super().n_gpu))

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
    set_direction(values)
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(find_file("ds_configs", values["deepspeed"]))
    if values.get("deepspeed") is not None:
        _check_zero(values["deepspeed"])
    with_deepspeed = _reject_two_configs(values)
    if with_deepspeed and not any(name in os.environ for name in LOCAL_RANKS):
        raise ConfigError(
            "training.deepspeed needs a launcher: start with deepspeed, accelerate launch or torchrun, "
            "or pass --deepspeed null to run in this one process"
        )
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
    """How base weights are held.

    Raises:
        ConfigError: in float16 without DeepSpeed, where the Trainer would scale float16 gradients.
    """
    named = recipe.model.dtype or ("bfloat16" if args.bf16 else "float16" if args.fp16 else "float32")
    if args.fp16 and named == "float16" and args.deepspeed_plugin is None:
        raise ConfigError(
            "training.fp16 without DeepSpeed needs gradients in float32: pass --model.dtype float32 (products are in "
            "float16 all the same), or bf16, or a DeepSpeed config, e.g. --deepspeed zero2_bf16"
        )
    return getattr(torch, named)


def _reject_two_configs(values: dict[str, Any]) -> bool:
    """Whether DeepSpeed runs. What `accelerate launch` brings must be the recipe's config, if it has one."""
    named = values.get("deepspeed")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return named is not None
    brought = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if brought.lower() != "none":
        _check_zero(brought)
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


def _check_zero(source: Any) -> None:
    config = _read_config(source)
    problems = [*zero_problems(config), *misspelt_keys(config)]
    if problems:
        named = source if isinstance(source, str) else "of the recipe"
        raise ConfigError(f"DeepSpeed config {named}: {'; '.join(problems)}")


def _read_config(source: Any) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"DeepSpeed config {source} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"DeepSpeed config {source} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"DeepSpeed config {source} holds a {type(config).__name__}, expected a JSON object"
        )
    return config


def start_deepspeed_on_cpu(values: dict[str, Any]) -> None:
    """Collective. Start the process group and say so in TrainingArguments' `accelerator_config`.

    Args:
        values: arguments of TrainingArguments, changed in place.

    Raises:
        ConfigError: settings that rule DeepSpeed out.
    """
    assert not torch.cuda.is_available()
    if values.get("use_cpu"):
        raise ConfigError("training.use_cpu rules out DeepSpeed; leave it out, or pass --deepspeed null")
    AcceleratorState._reset_state(reset_partial_state=True)  # type: ignore[no-untyped-call]
    with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo", timeout=timedelta(seconds=values.get("ddp_timeout", 1800)))
    own = values.get("accelerator_config") or {}
    if not isinstance(own, dict):
        raise ConfigError("training.accelerator_config must be written out in the recipe to run on the CPU")
    values["accelerator_config"] = {**own, "use_configured_state": True}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-text token where it has none of its own). Local."""
    own = config.tokenizer is None
    return open_tokenizer(config.tokenizer or config.name, **_source(config, own=own))


def load_model(config: ModelConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Collective under ZeRO-3. The decoder with its pretrained weights.

    The DeepSpeed config must be known to transformers by now (TrainingArguments make it so), or every rank
    would load the whole model.

    Raises:
        ConfigError: there is no such model, or its vocabulary does not fit the tokenizer's.
        FormatError: the folder is one that dsee_scale saved, but no whole model.
    """
    options = _source(config, own=True)

    with raise_on_all_ranks(what=f"reading the config of model {config.name!r}"):
        open_if_saved(Path(config.name), (EXPORT,))  # refuses what would load as something else
        found: Any = read_config(config.name, **options)
        check_vocabulary(tokenizer, found.get_text_config().vocab_size, config.name)
    extra: dict[str, Any] = (
        {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    )
    if config.quantization is not None:
        extra["quantization_config"] = quantization_config(config.quantization, dtype)
    extra |= hub_options(config.name)
    model = AutoModelForCausalLM.from_pretrained(config.name, config=found, dtype=dtype, **options, **extra)
    if getattr(model, "is_quantized", False):
        with raise_on_all_ranks(what=f"preparing the quantised model {config.name!r}"):
            prepare_quantised(model)
        # bitsandbytes tells at every product that it casts to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # The Trainer refuses quantised models unless PEFT's mark says that there are adapters to train.
        model._hf_peft_config_loaded = True
    return model


def quantization_config(values: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' config from the recipe's values; 4-bit layers compute in the model's dtype by default."""
    settings = dict(values)
    if settings.get("load_in_4bit"):
        settings.setdefault("bnb_4bit_compute_dtype", dtype)
    try:
        return BitsAndBytesConfig(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.quantization: {error}") from error


def _source(config: ModelConfig, *, own: bool) -> dict[str, Any]:
    return {
        "revision": (config.revision or "main") if own else "main",
        "trust_remote_code": config.trust_remote_code,
    }
