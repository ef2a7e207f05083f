"""Zeroed parameters of a plain model are forgotten by torch's and bitsandbytes' optimizers."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.partition import open_partition
from dsee_scale.pruning.zero_lines import Lines, zero_lines
from tests.models import build, llama_config, token_batch

RATE = 1e-2


class Two(torch.nn.Module):
    """Both large enough for moments in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.reset = torch.nn.Parameter(torch.randn(70, 80, generator=torch.Generator().manual_seed(0)))
        self.kept = torch.nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(1)))


def step(model: Two, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).sign()
    optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_zeroed_parameters_of_a_plain_model_start_anew(name):
    cls = getattr(torch.optim if name == "AdamW" else pytest.importorskip("bitsandbytes").optim, name)
    model, twin = Two(), Two()
    optimizers = [cls(each.parameters(), lr=RATE, weight_decay=0.0) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        for seed in range(3):
            step(each, optimizer, seed)
    lines = Lines(model.reset, 0, torch.ones(1, dtype=torch.bool), (1, model.reset.numel()))
    zero_lines(model, open_partition(model), [lines])
    assert not model.reset.any()
    assert torch.equal(model.kept, twin.kept)
    assert model.reset.grad is not None and not model.reset.grad.any()
    step(model, optimizers[0], 3)
    # Only the last gradient, of size 1, is remembered; bias is corrected for four steps.
    expected = RATE * (0.1 / (1 - 0.9**4)) / (0.001 / (1 - 0.999**4)) ** 0.5
    moved = model.reset.abs()
    assert moved.max() < 1.05 * expected and moved.min() > 0.95 * expected
    step(twin, optimizers[1], 3)
    assert torch.equal(model.kept, twin.kept)


def test_moments_that_are_loaded_after_lines_were_zeroed_stay(tmp_path):
    """They may belong to steps that came after the zeros."""
    models = [build(llama_config()) for _ in range(2)]
    optimizers = []
    for model in models:
        dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=2, num_sparse=4, support="random"))
        optimizers.append(torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=RATE))
        train(model, optimizers[-1], seed=0)
    save_training_state(models[0], tmp_path / "state", optimizer=optimizers[0])
    flat = next(iter(adapted_layers(models[0]).values())).dsee_flat
    lines = Lines(flat, 0, torch.ones(1, dtype=torch.bool), (1, flat.numel()))
    zero_lines(models[0], open_partition(models[0]), [lines])
    load_training_state(models[0], tmp_path / "state", optimizer=optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, seed=1)
    for found, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(found, wanted)


def train(model, optimizer, seed):
    ids = token_batch(seed=seed)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
