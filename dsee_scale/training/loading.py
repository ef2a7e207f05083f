"""Tokenizer and model by name; under ZeRO-3 the weights are partitioned while they load."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dsee_scale.errors import ConfigError
from dsee_scale.training.sections import ModelConfig
from dsee_scale.training.together import together


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-text token where it has none of its own). Local."""
    name = config.tokenizer or config.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_source(config, own=config.tokenizer is None))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} does not load: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Collective under ZeRO-3. The decoder with its pretrained weights.

    The DeepSpeed config must be known to transformers by now (TrainingArguments make it so), or every rank
    would load the whole model.

    Raises:
        ConfigError: there is no such model, or its vocabulary is smaller than the tokenizer's.
    """
    # A lazy import of this inside zero.Init fails with torch 2.13 and DeepSpeed 0.19 ("Signature mismatch").

    options = _source(config, own=True)

    def read_config() -> Any:
        found = AutoConfig.from_pretrained(config.name, **options)
        words = found.get_text_config().vocab_size
        if len(tokenizer) > words:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} has {len(tokenizer):,} tokens, but the model "
                f"{config.name!r} knows {words:,}; use the tokenizer that belongs to it"
            )
        return found

    found = together(read_config, what=f"reading the config of model {config.name!r}")
    extra = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    return AutoModelForCausalLM.from_pretrained(config.name, config=found, dtype=dtype, **options, **extra)


def _source(config: ModelConfig, *, own: bool) -> dict[str, Any]:
    return {
        "revision": (config.revision or "main") if own else "main",
        "trust_remote_code": config.trust_remote_code,
    }
