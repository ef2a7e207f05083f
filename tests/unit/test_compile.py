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


def compile_whole(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compile_in_place(model: torch.nn.Module) -> Any:
    model.compile(backend="eager")
    return model


def compile_a_layer(model: Any) -> Any:
    model.model.layers[0].compile(backend="eager")
    return model


def compile_a_forward(model: Any) -> Any:
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


@pytest.mark.parametrize("wrap", [compile_whole, compile_in_place, compile_a_layer, compile_a_forward])
def test_a_model_that_has_run_compiled_is_pruned_as_one_that_is_not(wrap):
    """Its code was made before the hooks of the calibration."""
    torch.compiler.reset()
    data = [{"input_ids": token_batch()}]
    plain = [build(llama_config()) for _ in range(2)]
    called = [wrap(build(llama_config())) for _ in range(2)]
    for config, other, model in zip((PruneConfig(), PruneConfig(refit=False)), plain, called, strict=True):
        model.eval()
        with torch.no_grad():
            model(**data[0], use_cache=False)
        assert dsee_scale.calibrate(model, data).tokens == dsee_scale.calibrate(other, data).tokens
        for each in (model, other):
            dsee_scale.prune(each, config, data)
        pairs = zip(getattr(model, "_orig_mod", model).parameters(), other.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_compiled_model_trains_and_is_pruned_alike(name, dtype):
    torch.compiler.reset()
    expected = losses(name, lambda model: model, dtype)
    found = losses(name, lambda model: torch.compile(model, backend="aot_eager"), dtype)
    torch.compiler.reset()
    assert len(set(expected)) == 6
    assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)
