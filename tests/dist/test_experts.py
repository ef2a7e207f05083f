"""Experts of partitioned mixtures of experts against the dense path, under the real engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from tests.dist.test_inject_prune import engine_for, fill_adapters, whole_weights
from tests.models import build, moe_config, partition, zero3_config

ATTENTION = {"deepseek_v3": ("o_proj", "kv_b_proj"), "gpt_oss": ("q_proj", "v_proj")}


def make(model_type: str, ds_config: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Any:
    """A mixture of experts with adapted attention, under an engine if there is a DeepSpeed config."""
    model = build(moe_config(model_type), dtype)
    if ds_config is not None:
        partition(model, ds_config)
    targets = ATTENTION.get(model_type, ("q_proj", "o_proj"))
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, target_modules=targets))
    fill_adapters(model)
    return model if ds_config is None else engine_for(model, ds_config)


WITHIN = (
    PruneConfig(sparsity=0.3, scope="global", score="WABS"),
    PruneConfig(sparsity=0.4, scope="row", score="W", modules=("*.experts.*",)),
    PruneConfig(sparsity=0.5, scope="matrix", score="random", modules=("*.experts.*",)),
    PruneConfig(pattern="2:4", score="W", modules=("*.experts.*",)),
)


def pruned_within(model_type: str, ds_config: dict[str, Any] | None, dtype: torch.dtype) -> Any:
    model = make(model_type, ds_config, dtype)
    found = []
    for config in WITHIN:
        report = dsee_scale.prune(model, config)
        found.append((whole_weights(model), report.matrices))
    return found


@pytest.mark.parametrize("model_type, dtype", [("qwen3_moe", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_zeros_within_experts_are_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, model_type, dtype):
    expected = pruned_within(model_type, None, dtype)
    for world_size in (1, 2, 3):
        for found in pools(world_size).run(pruned_within, model_type, zero3_config(dtype), dtype):
            for (weights, counts), (expected_weights, expected_counts) in zip(found, expected, strict=True):
                assert counts == expected_counts, world_size
                for name, weight in expected_weights.items():
                    assert torch.equal(weights[name], weight), (world_size, name)
