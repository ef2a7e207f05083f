"""What is trained under the mask is what is exported, under the real engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.partition import unwrap
from tests.dist.test_inject_prune import engine_for, fill_adapters, train
from tests.models import build, gpt2_config, llama_config, partition, token_batch, zero3_config

LLAMA = (
    lambda: llama_config(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=56),
    DSEEConfig(rank=3, num_sparse=40, target_modules=("*.self_attn.*", "*.mlp.*")),
)
GPT2 = (
    gpt2_config,
    DSEEConfig(
        rank=3,
        num_sparse=40,
        target_modules=("c_attn", "c_proj", "c_fc"),
        output_slices={"c_attn": ("q", "v")},
    ),
)
PRUNINGS = {
    "half": PruneConfig(sparsity=0.5),
    "2:4": PruneConfig(pattern="2:4"),
    "half by size": PruneConfig(sparsity=0.5, score="W"),
    "2:4 by size": PruneConfig(pattern="2:4", score="WABS"),
}
CASES = {
    "llama, half, bf16": (LLAMA, "half", torch.bfloat16, None, {}),
    "llama, 2:4, fp32": (LLAMA, "2:4", torch.float32, None, {}),
    "llama, half, bf16, ZeRO-2": (LLAMA, "half", torch.bfloat16, None, {"stage": 2}),
    "llama, 2:4, bf16, hierarchical": (LLAMA, "2:4", torch.bfloat16, None, {"zero_hpz_partition_size": 2}),
    "llama, 2:4 by size, fp32, checkpointing": (LLAMA, "2:4 by size", torch.float32, False, {}),
    "llama, half by size, fp32, reentrant": (LLAMA, "half by size", torch.float32, True, {}),
    "llama, 2:4, bf16, offloaded": (
        LLAMA,
        "2:4",
        torch.bfloat16,
        None,
        {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    ),
    "gpt2, half by size, fp32": (GPT2, "half by size", torch.float32, None, {}),
}


def retuned(folder: str, case: str) -> tuple[list[float], torch.Tensor, int]:
    """Tune, prune, retune under the mask, export; losses and logits of the live engine."""
    (config, dsee), pruning, dtype, reentrant, zero = CASES[case]
    ds_config = zero3_config(dtype, **zero)
    if "offload_param" in zero:
        ds_config["optimizer"]["params"].pop("torch_adam")
    model: Any = build(config(), dtype)
    model = model if "stage" in zero else partition(model, ds_config)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    dsee_scale.inject(model, dsee)
    fill_adapters(model)
    engine = engine_for(model.train(), ds_config)
    train(engine, 2)
    dsee_scale.prune(engine, PRUNINGS[pruning], [token_batch(seed=seed) for seed in (1, 2)])
    losses = train(engine, 3)
    dsee_scale.export_model(engine, folder, overwrite=True)
    engine.eval()
    with torch.no_grad():
        logits = engine(token_batch()).logits.float()
    layers = adapted_layers(unwrap(engine)).values()
    return losses, logits, sum(bool(layer.dsee_under_mask) for layer in layers)


@pytest.mark.parametrize(
    "case, world_size", [*((case, 2) for case in CASES), ("llama, half, bf16", 1), ("llama, 2:4, fp32", 1)]
)
def test_the_masked_export_has_the_logits_of_the_live_engine(pools, tmp_path, case, world_size):
    found = pools(world_size).run(retuned, str(tmp_path / "model"), case)
    dtype = CASES[case][2]
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    linears = 8 if "gpt2" in case else 14
    sparse = [p for n, p in stock.named_parameters() if (p.dim() == 2 and ".layers." in n) or ".h." in n]
    zeros = sum(int((p == 0).sum()) for p in sparse if p.dim() == 2)
    assert zeros >= sum(p.numel() for p in sparse if p.dim() == 2) // 2
    with torch.no_grad():
        expected = stock(token_batch()).logits.float()
    for losses, logits, under_mask in found:
        assert under_mask == linears and losses[-1] < losses[0]
        scale = expected.abs().max()
        assert (logits - expected).abs().max() <= scale * (1e-5 if dtype == torch.float32 else 1e-6)
