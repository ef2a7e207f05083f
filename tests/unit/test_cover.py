"""S2 written as ranks: the cover is smallest, and the factors give B A + S2 back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsee_scale.algorithms.cover import Cover, as_low_rank, smallest_cover
from dsee_scale.algorithms.delta import AdapterSpec, Delta, delta_block

POSITIONS = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14)


def tensors(positions: set[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(sorted(positions), dtype=torch.int64).reshape(-1, 2)
    return table[:, 0] * 7, table[:, 1] * 5 + 2


def smallest_by_trying(rows: torch.Tensor, cols: torch.Tensor) -> int:
    """Size of a smallest cover: every choice of rows, with the columns of what it leaves."""
    distinct = rows.unique().tolist()
    best = len(distinct)
    for count in range(len(distinct)):
        for chosen in itertools.combinations(distinct, count):
            left = cols[~torch.isin(rows, torch.tensor(chosen, dtype=torch.int64))]
            best = min(best, count + len(left.unique()))
    return best


@given(POSITIONS)
@settings(max_examples=200, deadline=None)
def test_the_cover_holds_every_entry_and_none_is_smaller(positions):
    rows, cols = tensors(positions)
    cover = smallest_cover(rows, cols)
    assert (torch.isin(rows, cover.rows) | torch.isin(cols, cover.cols)).all()
    assert cover.size == smallest_by_trying(rows, cols)
    assert (cover.rows.diff() > 0).all() and (cover.cols.diff() > 0).all()


def test_a_full_row_costs_one_rank_and_a_diagonal_one_for_each_entry():
    line = torch.arange(50)
    assert smallest_cover(torch.full((50,), 3), line).size == 1
    assert smallest_cover(line, torch.full((50,), 3)).size == 1
    assert smallest_cover(line, line).size == 50


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [((0, 12),), ((0, 4), (8, 12))])
@pytest.mark.parametrize("num_sparse", [0, 9])
def test_the_factors_are_the_update(transposed, slices, num_sparse):
    generator = torch.Generator().manual_seed(3)
    spec = AdapterSpec(
        shape=(12, 10), transposed=transposed, slices=slices, rank=2, num_sparse=num_sparse, scaling=0.7
    )
    flat = torch.randn(spec.numel, generator=generator, dtype=torch.float64)
    chosen = []
    for start, stop in slices:
        order = torch.randperm((stop - start) * 10, generator=generator)[:num_sparse].sort().values
        chosen.append(torch.stack([order // 10 + start, order % 10]))
    rows, cols = torch.cat(chosen, dim=1).int()
    delta = Delta.of(spec, flat, rows, cols)
    cover = smallest_cover(rows, cols)
    for rank in (None, 2 * len(slices) + cover.size + 3):
        a, b = as_low_rank(delta, cover, rank=rank)
        whole = spec.scaling * (b @ a)
        expected = delta_block(delta, 0, spec.storage_shape[0])
        torch.testing.assert_close(whole.t() if transposed else whole, expected)


def test_no_entries_need_no_rank():
    nowhere = torch.empty(0, dtype=torch.int32)
    cover = smallest_cover(nowhere, nowhere)
    assert isinstance(cover, Cover) and cover.size == 0
