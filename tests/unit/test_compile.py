"""torch.compile changes no loss: while tuning, after a pruning, and while training under the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from tests.models import build, gpt2_config, llama_config, token_batch

CONFIGS = {
    "llama": (
        llama_config(),
        DSEEConfig(rank=2, num_sparse=5, support="magnitude", target_modules=("q_proj", "down_proj")),
    ),
    "gpt2": (
        gpt2_config(),
        DSEEConfig(rank=2, num_sparse=5, support="magnitude", target_modules=("c_attn", "c_fc")),
    ),
}


def losses(name: str, wrap: Any, dtype: torch.dtype) -> list[float]:
    """Three steps, a pruning with what activations say, three steps under the mask."""
    base, config = CONFIGS[name]
    model: Any = build(base, dtype)
    dsee_scale.inject(model, config)
    called = wrap(model)
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    found = []
    for step in range(6):
        if step == 3:
            dsee_scale.prune(called, PruneConfig(refit=False), [{"input_ids": token_batch()}])
        ids = token_batch(seed=step)
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_compiled_model_trains_and_is_pruned_alike(name, dtype):
    torch.compiler.reset()
    expected = losses(name, lambda model: model, dtype)
    found = losses(name, lambda model: torch.compile(model, backend="aot_eager"), dtype)
    torch.compiler.reset()
    assert len(set(expected)) == 6
    assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)
