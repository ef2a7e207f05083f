"""Moments in 8 bits: read, written back, cleared, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from dsee_scale.partition.eight_bit_moments import is_eight_bit, read_moment, write_moment
from dsee_scale.partition.engine_state import open_optimizer
from dsee_scale.partition.optimizer_state import MASTER

optim = pytest.importorskip("bitsandbytes").optim


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
        self.small = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(1)))


def trained(cls: type, steps: int) -> tuple[Small, torch.optim.Optimizer]:
    model = Small()
    optimizer = cls(model.parameters(), lr=1e-2)
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    "cls", [optim.AdamW8bit, optim.PagedAdamW8bit, optim.Lion8bit, optim.PagedAdamW32bit]
)
def test_training_goes_on_from_saved_moments(cls):
    there, before = trained(cls, 4)
    source = open_optimizer(there, before)
    keys = source.moments()
    items = [(name, key) for name in ("large", "small") for key in (MASTER, *keys)]
    saved = dict(zip(items, source.gather(items), strict=True))
    assert all(values.dtype == torch.float32 and values.abs().max() < 10 for values in saved.values())
    here = Small()
    after = cls(here.parameters(), lr=1e-2)
    target = open_optimizer(here, after)
    for (name, key), values in saved.items():
        target.put(name, key, values)
    target.put_steps(source.steps())
    go_on(there, before, range(4, 8))
    go_on(here, after, range(4, 8))
    for name, param in here.named_parameters():
        there_too = there.get_parameter(name)
        if is_eight_bit(after.state[param], "state1"):  # rounded to 8 bits once more; four steps move 0.04
            assert (param - there_too).abs().max() < (0.021 if cls is optim.Lion8bit else 2e-3), name
            assert (param - there_too).abs().mean() < 1e-4, name
        else:
            assert torch.equal(param, there_too), name


def test_what_was_read_is_written_back_almost_unchanged_and_zeros_stay_zero():
    model, optimizer = trained(optim.AdamW8bit, 3)
    state = optimizer.state[model.large]
    assert is_eight_bit(state, "state1") and not is_eight_bit(optimizer.state[model.small], "state1")
    for key in ("state1", "state2"):
        values = read_moment(state, key, 0, 5000)
        write_moment(state, key, 0, values)
        assert (read_moment(state, key, 0, 5000) - values).abs().max() < 0.02 * values.abs().max()
        write_moment(state, key, 100, torch.zeros(200))
        cleared = read_moment(state, key, 0, 5000)
        assert not cleared[100:300].any() and cleared.any()
        assert torch.equal(read_moment(state, key, 300, 700), cleared[300:1000])


def test_many_parameters_in_one_flat_moment_do_not_wear_each_other_down():
    """As under ZeRO, where every trained parameter is a stretch of one tensor. A write rounds its own blocks only."""
    model, optimizer = trained(optim.AdamW8bit, 3)
    state = optimizer.state[model.large]
    for key in ("state1", "state2"):
        saved = read_moment(state, key, 0, 5000).clone()
        for start in range(0, 5000, 50):
            write_moment(state, key, start, saved[start : start + 50])
        found = read_moment(state, key, 0, 5000)
        assert (found - saved).norm() < 0.05 * saved.norm()
        assert found.norm() == pytest.approx(float(saved.norm()), rel=0.03)
