"""What a pruning on an accelerator waits for, told on the CPU: blocks and chunks of 64 entries stand for 2**24."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.algorithms import bits, delta
from dsee_scale.algorithms.loops import torch_loops
from dsee_scale.algorithms.select import CutSearch
from dsee_scale.passes.calibrate import calibrate
from dsee_scale.passes.pools import block_linears
from tests.dist.test_inject_prune import fill_adapters
from tests.models import build, llama_config, moe_config, token_batch
from tests.watch import Watch

TARGETS = ("q_proj", "v_proj", "up_proj")
PRUNINGS = {
    "W": PruneConfig(sparsity=0.5, score="W"),
    "WABS": PruneConfig(sparsity=0.5, score="WABS"),
    "ABS": PruneConfig(sparsity=0.3, score="ABS"),
    "random": PruneConfig(sparsity=0.999, score="random"),
    "2:4": PruneConfig(pattern="2:4", score="WABS", modules=("q_proj", "v_proj", "up_proj")),
    "heads": PruneConfig(pattern="heads", num_per_layer=2, score="WABS"),
    "neurons": PruneConfig(pattern="neurons", sparsity=0.3, score="WABS"),
}


def adapted(dtype: torch.dtype) -> torch.nn.Module:
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=52)
    model = build(llama_config(**sizes), dtype)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=40, target_modules=TARGETS))
    fill_adapters(model)
    return model


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for an accelerator."""
    monkeypatch.setattr(bits, "is_host", lambda device: False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (delta, "BLOCK_ENTRIES"),
        (delta, "DEVICE_BLOCK_ENTRIES"),
        (torch_loops, "CPU_CHUNK"),
        (torch_loops, "DEVICE_CHUNK"),
    ):
        monkeypatch.setattr(module, name, 64)


ROUNDS = {"2:4": 2, "heads": 3, "neurons": 3}
"""Passes over every weight: of units for the largest score, the sums and the zeros; others count their own."""


@pytest.mark.parametrize(
    ("pruning", "dtype"),
    [(name, torch.bfloat16 if name in ("W", "2:4") else torch.float32) for name in PRUNINGS],
)
def test_an_accelerator_is_waited_for_three_times_a_matrix_and_round(
    small_blocks, request, monkeypatch, pruning, dtype
):
    expected = adapted(dtype)
    report = dsee_scale.prune(expected, PRUNINGS[pruning])
    request.getfixturevalue("accelerator")
    rounds = [1] * ROUNDS.get(pruning, 1)  # the zeros are written in one
    advance = CutSearch.advance

    def counting(search: CutSearch, summed: torch.Tensor) -> Any:
        rounds.append(1)
        return advance(search, summed)

    monkeypatch.setattr(CutSearch, "advance", counting)
    model = adapted(dtype)
    with Watch() as watch:
        found = dsee_scale.prune(model, PRUNINGS[pruning])
    assert found.matrices == report.matrices
    for name, param in model.named_parameters():
        assert torch.equal(param, dict(expected.named_parameters())[name]), name
    assert len(watch.syncs) <= 3 * len(report.matrices) * len(rounds), sorted(watch.syncs)
    assert min(module.weight.numel() for module in block_linears(model).values()) > 12 * 64  # type: ignore[operator, union-attr]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what is fetched from the accelerator, which the CPU stands for."""
    found: list[torch.Size] = []
    cpu = torch.Tensor.cpu

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.shape)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    return found


def test_a_step_of_pruned_experts_fetches_nothing(small_blocks, accelerator, copies):
    model = build(moe_config("qwen3_moe"))
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=40, target_modules=("experts",)))
    fill_adapters(model)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W", refit=False))
    model(input_ids=token_batch())  # what is fetched once
    copies.clear()
    model(input_ids=token_batch()).logits.sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    assert not copies


def test_calibrating_experts_fetches_as_much_for_many_batches_as_for_one(copies):
    fetched = []
    for number in (1, 6):
        copies.clear()
        calibrate(build(moe_config("qwen3_moe")), [{"input_ids": token_batch()}] * number)
        fetched.append(len(copies))
    assert fetched[0] == fetched[1]
