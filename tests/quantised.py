"""A tiny Llama quantised by bitsandbytes, shared by unit and distributed tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import dsee_scale
from dsee_scale import DecompositionConfig, DSEEConfig
from tests.models import build, llama_config, token_batch

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "fp4, double": {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4, double, stored as bf16": {
        **NF4,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
DSEE = DSEEConfig(
    rank=3, num_sparse=7, target_modules=("q_proj", "v_proj"), decomposition=DecompositionConfig(rank=4)
)
BATCH = token_batch(batch=2, length=12)


def write_llama(folder: Path) -> Path:
    """A bfloat16 Llama folder, whose rows bitsandbytes can hold."""
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    build(llama_config(**sizes), torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


def quantised_llama(folder: Path, form: str) -> nn.Module:
    """The folder's model in a bitsandbytes format, loaded by stock transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**FORMATS[form])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def injected_llama(folder: Path, form: str) -> nn.Module:
    model = quantised_llama(folder, form)
    dsee_scale.inject(model, DSEE)
    return model


def evaluate(model: nn.Module) -> float:
    """Loss in eval mode without gradients, as a training run measures it; back in training mode afterwards."""
    model.eval()
    with torch.no_grad():
        loss = float(model(input_ids=BATCH, labels=BATCH).loss)
    model.train()
    return loss
