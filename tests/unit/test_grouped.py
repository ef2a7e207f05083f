"""Experts' products against the dense formula, expert by expert, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsee_scale.adapters.kernels.factors import make_fold
from dsee_scale.adapters.kernels.grouped import ExpertUpdate, expert_product, grouped_mm, grouped_outer
from dsee_scale.algorithms.delta import AdapterSpec, Delta, delta_block, merged_weight

EXPERTS, OUT, IN, RANK, COUNT = 4, 6, 5, 2, 3
TOKENS = [3, 0, 5, 2]
"""Of each expert; one has none."""


def make(transposed: bool, shared: bool, count: int, *, thin: bool, seed: int = 0):
    """Weight with zeros, adapter values that are nowhere zero, and the update; sorted distinct positions."""
    g = torch.Generator().manual_seed(seed)
    rows, cols = (IN, OUT) if transposed else (OUT, IN)
    spec = AdapterSpec(
        shape=(EXPERTS * rows, cols), transposed=False, rank=RANK, num_sparse=count, scaling=1.5,
        experts=True, shared_a=shared,
        slices=tuple((e * rows, (e + 1) * rows) for e in range(EXPERTS)),
    )  # fmt: skip
    flat_at = [torch.randperm(rows * cols, generator=g)[:count].sort().values for _ in range(EXPERTS)]
    at = (
        torch.stack([p // cols + e * rows for e, p in enumerate(flat_at)]),
        torch.stack([p % cols for p in flat_at]),
    )
    at_rows, at_cols = (t.flatten().to(torch.int32) for t in at)
    weight = torch.randn(EXPERTS, rows, cols, generator=g, dtype=torch.float64)
    weight[torch.rand(weight.shape, generator=g) < 0.4] = 0
    flat = torch.randn(spec.numel, generator=g, dtype=torch.float64)
    fold = make_fold(spec, at_rows, at_cols, multiple=8 if shared else 1) if thin else None
    return weight, flat, ExpertUpdate(spec, at_rows, at_cols, transposed, fold)


def dense_delta(flat: Tensor, update: ExpertUpdate) -> Tensor:
    """s (B A + S2) of each expert by its definition, as stored; differentiable."""
    spec, (_, rows, cols) = update.spec, update.shape
    a, b, values = spec.split(flat)
    found = []
    for e in range(EXPERTS):
        own = a if spec.shared_a else a[e * RANK : (e + 1) * RANK]
        part = slice(e * spec.num_sparse, (e + 1) * spec.num_sparse)
        at = update.rows[part].long() - e * rows, update.cols[part].long()
        sparse = torch.zeros(rows, cols, dtype=flat.dtype).index_put(at, values[part])
        found.append(spec.scaling * (b[e * rows : (e + 1) * rows] @ own + sparse))
    return torch.stack(found)


def dense_product(x: Tensor, weight: Tensor, flat: Tensor, update: ExpertUpdate, masked: bool) -> Tensor:
    matrices = weight + dense_delta(flat, update)
    matrices = matrices * (weight != 0) if masked else matrices
    bounds = [0, *itertools.accumulate(TOKENS)]
    parts = []
    for e in range(EXPERTS):
        tokens = x[bounds[e] : bounds[e + 1]]
        parts.append(tokens @ (matrices[e] if update.transposed else matrices[e].t()))
    return torch.cat(parts)


FORMS = [(False, True), (False, False), (True, False)]
"""(masked, thin)."""


@pytest.mark.parametrize("count", [0, COUNT])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("masked", "thin"), FORMS)
def test_output_and_gradients_are_the_dense_formulas(masked, thin, transposed, shared, count):
    weight, flat, update = make(transposed, shared, count, thin=thin)
    ends = torch.tensor(TOKENS).cumsum(0).to(torch.int32)
    x = torch.randn(sum(TOKENS), IN, dtype=torch.float64, requires_grad=True)
    flat.requires_grad_()

    found = expert_product(x, weight, flat, ends, update, masked=masked)
    expected = dense_product(x, weight, flat, update, masked)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, flat), dy), torch.autograd.grad(expected, (x, flat), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("masked", "thin"), FORMS)
def test_gradients_are_those_of_small_steps(masked, thin):
    weight, flat, update = make(False, False, COUNT, thin=thin)
    ends = torch.tensor(TOKENS).cumsum(0).to(torch.int32)
    x = torch.randn(sum(TOKENS), IN, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, f: expert_product(x, weight, f, ends, update, masked=masked),
        (x, flat.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_delta_of_experts_is_the_dense_one_in_any_rows(shared):
    _, flat, update = make(False, shared, COUNT, thin=True)
    delta = Delta.of(update.spec, flat, update.rows, update.cols)
    expected = dense_delta(flat, update).flatten(0, 1)
    for start, stop in ((0, EXPERTS * OUT), (OUT, 3 * OUT), (2, 3), (4, 2 * OUT + 1)):
        torch.testing.assert_close(
            delta_block(delta, start, stop), expected[start:stop], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("block", [1, OUT * IN, 3 * OUT * IN + 1, 10**6])
def test_merging_in_blocks_of_any_size_gives_the_same_weight(block, monkeypatch):
    weight, flat, update = make(False, True, COUNT, thin=True)
    monkeypatch.setattr("dsee_scale.algorithms.delta.BLOCK_ENTRIES", block)
    delta = Delta.of(update.spec, flat, update.rows, update.cols)
    merged = merged_weight(weight.flatten(0, 1), delta, pruned=True, form="masked")
    expected = (weight + dense_delta(flat, update)) * (weight != 0)
    torch.testing.assert_close(merged, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [TOKENS, [0, 0, 0, 0], [0, 9, 0, 0]])
def test_pytorchs_grouped_product_and_the_padded_one_agree(counts, dtype, monkeypatch):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    x, matrices = torch.randn(sum(counts), 16).to(dtype), torch.randn(4, 16, 8).to(dtype)
    other = torch.randn(sum(counts), 24).to(dtype)
    native = grouped_mm(x, matrices, ends), grouped_outer(x, other, ends)
    monkeypatch.setattr("dsee_scale.adapters.kernels.grouped._native", lambda *operands: None)
    for one, two in zip(native, (grouped_mm(x, matrices, ends), grouped_outer(x, other, ends)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("masked", [False, True])
def test_no_tokens_give_no_outputs_and_zero_gradients(masked):
    weight, flat, update = make(False, False, COUNT, thin=True)
    flat.requires_grad_()
    x = torch.empty(0, IN, dtype=torch.float64, requires_grad=True)
    ends = torch.zeros(EXPERTS, dtype=torch.int32)
    y = expert_product(x, weight, flat, ends, update, masked=masked)
    y.sum().backward()
    assert y.shape == (0, OUT) and not flat.grad.any()
