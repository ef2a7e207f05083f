"""Small models of real architectures, and DeepSpeed configs, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig


def llama_config(**changes: Any) -> LlamaConfig:
    """Grouped-query Llama whose sizes divide neither by 2 nor by 3 everywhere."""
    sizes: dict[str, Any] = dict(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        max_position_embeddings=64,
        head_dim=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaConfig(**{**sizes, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    sizes: dict[str, Any] = dict(
        vocab_size=97, n_positions=64, n_embd=36, n_layer=2, n_head=3, use_cache=False
    )
    return GPT2Config(**{**sizes, **changes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})


MOE_SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=28,
    moe_intermediate_size=12,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    use_cache=False,
)


def moe_config(model_type: str, experts: int = 5, **changes: Any) -> PretrainedConfig:
    """A tiny mixture of experts, of any type that transformers knows; no size divides by 2 and 3 everywhere."""
    sizes = {**MOE_SIZES, "num_experts": experts, "num_local_experts": experts, "n_routed_experts": experts}
    if model_type in ("deepseek_v3", "glm4_moe"):
        sizes |= dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
    if model_type == "deepseek_v3":
        sizes |= dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        sizes |= dict(head_dim=4, num_key_value_heads=4)
    if model_type in ("mixtral", "gpt_oss"):
        sizes["intermediate_size"] = sizes.pop("moe_intermediate_size")
    known = AutoConfig.for_model(model_type).to_dict()
    named = {key: value for key, value in sizes.items() if key in known or key == "head_dim"}
    return AutoConfig.for_model(model_type, **{**named, **changes})


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model, in one process; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(param, std=0.02)
    return model


def zero3_config(dtype: torch.dtype = torch.float32, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed config for ZeRO-3 on CPU."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def partition(model: nn.Module, ds_config: dict[str, Any]) -> nn.Module:
    """Put an existing model's weights under ZeRO-3, as `from_pretrained` under HfDeepSpeedConfig leaves them."""
    import deepspeed

    dtype = next(model.parameters()).dtype
    deepspeed.zero.Init(module=model, config_dict_or_path=ds_config, dtype=dtype)
    return model


def token_batch(vocab: int = 97, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
