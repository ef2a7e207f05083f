"""torch.compile under ZeRO-3 changes no loss."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from tests.models import build, llama_config, partition, token_batch, zero3_config


def losses(compiled: bool) -> list[float]:
    """Two steps, a pruning, two steps under the mask, on a pool's rank."""
    import deepspeed

    torch.compiler.reset()
    config = zero3_config()
    model = partition(build(llama_config(num_hidden_layers=1)), config)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, target_modules=("q_proj", "down_proj")))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=dsee_scale.trainable_parameters(model), config=config
    )
    if compiled:
        engine.compile(backend="aot_eager")
    found = []
    for step in range(4):
        if step == 2:
            dsee_scale.prune(engine, PruneConfig(score="W"))
        ids = token_batch(seed=2 * step + engine.global_rank, batch=1)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    torch.compiler.reset()
    return found


def test_a_compiled_engine_trains_and_is_pruned_alike(pools):
    expected, found = pools(2).run(losses, False), pools(2).run(losses, True)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5) and len(set(wanted)) == 4
