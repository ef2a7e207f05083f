"""Moments in 8 bits: read, written back, cleared, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, FormatError
from dsee_scale.checkpoint.adapter import load_adapter
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.partition.eight_bit_moments import is_eight_bit, read_moment, write_moment
from dsee_scale.partition.engine_state import open_optimizer
from dsee_scale.partition.optimizer_state import MASTER, OptimizerState, Stretch
from tests.models import build, llama_config, token_batch

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
    target.put_kept(source.kept(["step"]), source.scalars())
    for (name, key), values in saved.items():
        target.put(name, key, values)
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


def adapted(dtype: torch.dtype, folder: Path | None = None) -> torch.nn.Module:
    model = build(llama_config(), dtype)
    if folder is None:
        config = DSEEConfig(rank=8, num_sparse=8, target_modules=("q_proj", "down_proj"))
        dsee_scale.inject(model, config)
    else:
        load_adapter(model, folder)
    return model


def optimizer_of(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, name, None) or getattr(optim, name)
    return cls(
        dsee_scale.trainable_parameters(model), lr=3e-2, **({"min_8bit_size": 700} if "8" in name else {})
    )


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        ids = token_batch(seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_a_saved_run_goes_on_with_moments_of_the_optimizers_own_precision(tmp_path, name, dtype):
    there = adapted(dtype)
    before = optimizer_of(there, name)
    losses(there, before, range(3))
    save_training_state(there, tmp_path / "state", optimizer=before)
    expected = losses(there, before, range(3, 6))
    here = adapted(dtype, tmp_path / "state")
    after = optimizer_of(here, name)
    load_training_state(here, tmp_path / "state", optimizer=after)
    found = losses(here, after, range(3, 6))
    assert found == pytest.approx(expected, abs=2e-2 if "8" in name else 0)
    for (key, old), (_, new) in zip(before.state.items(), after.state.items(), strict=True):
        assert old["step"] == new["step"] == 6
        assert new["state1"].dtype == old["state1"].dtype == new.get("state2", new["state1"]).dtype, key.shape
    dtypes = {state["state1"].dtype for state in after.state.values()}
    assert dtypes == ({torch.float32, torch.uint8} if "8" in name else {torch.float32})


@pytest.mark.parametrize(
    ("saved", "loaded", "has"),
    [
        ("AdamW", "AdamW8bit", "has state1, state2"),
        ("AdamW8bit", "Lion8bit", "has state1"),
        ("AdamW8bit", "AdamW", "has others"),
    ],
)
def test_moments_of_another_optimizer_are_refused_before_the_model_changes(tmp_path, saved, loaded, has):
    there = adapted(torch.bfloat16)
    before = optimizer_of(there, saved)
    losses(there, before, range(1))
    save_training_state(there, tmp_path / "state", optimizer=before)
    here = adapted(torch.bfloat16, tmp_path / "state")
    after = optimizer_of(here, loaded)
    old = [param.clone() for param in here.parameters()]
    with pytest.raises(FormatError, match=rf"{loaded} {has};.*the optimizer of the saved run"):
        load_training_state(here, tmp_path / "state", optimizer=after)
    assert all(torch.equal(a, b) for a, b in zip(old, here.parameters(), strict=True))


def test_two_moments_in_one_tensor_are_refused(tmp_path):
    model = adapted(torch.bfloat16)
    optimizer = optimizer_of(model, "AdEMAMix8bit")
    losses(model, optimizer, range(1))
    with pytest.raises(
        ConfigError, match=r"AdEMAMix8bit keeps state1 of shape \(2, \d+\) for \d+ trained values"
    ):
        save_training_state(model, tmp_path / "state", optimizer=optimizer)
    assert not (tmp_path / "state").exists()


def test_parameters_in_one_flat_tensor_keep_their_step_where_one_has_made_none():
    """As under ZeRO, with a state from one process where an expert has seen no token."""
    flat = torch.nn.Parameter(torch.ones(5000))
    optimizer = optim.AdamW8bit([flat], lr=1e-2)
    stretches = {
        "seen": Stretch(0, 3000, flat, 0, optimizer, 0),
        "unseen": Stretch(0, 2000, flat, 3000, optimizer, 0),
    }
    state = OptimizerState(stretches, {"seen": 3000, "unseen": 2000}, [optimizer], device=torch.device("cpu"))
    state.put_kept({"seen": {"step": 3}}, {"step": "int"})
    state.put("seen", "state1", torch.ones(3000))
    assert optimizer.state[flat]["step"] == 3 and is_eight_bit(optimizer.state[flat], "state1")
    assert not read_moment(optimizer.state[flat], "state1", 3000, 2000).any()
