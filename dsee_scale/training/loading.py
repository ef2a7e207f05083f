"""Tokenizer and model by name; under ZeRO-3 the weights are partitioned while they load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from dsee_scale.errors import ConfigError
from dsee_scale.partition.quantized import prepare_quantised
from dsee_scale.training.sections import ModelConfig
from dsee_scale.training.together import together
from dsee_scale.training.tokenizer import check_vocabulary, open_tokenizer


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
    """
    options = _source(config, own=True)

    def read_config() -> Any:
        found = AutoConfig.from_pretrained(config.name, **options)
        check_vocabulary(tokenizer, found.get_text_config().vocab_size, config.name)
        return found

    found = together(read_config, what=f"reading the config of model {config.name!r}")
    extra: dict[str, Any] = (
        {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    )
    if config.quantization is not None:
        extra["quantization_config"] = quantization_config(config.quantization, dtype)
    model = AutoModelForCausalLM.from_pretrained(config.name, config=found, dtype=dtype, **options, **extra)
    if getattr(model, "is_quantized", False):
        together(lambda: prepare_quantised(model), what=f"preparing the quantised model {config.name!r}")
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
