"""The update's formula against a dense one, and blocks against whole weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsee_scale.algorithms import delta as delta_module
from dsee_scale.algorithms.delta import (
    AdapterSpec,
    Delta,
    delta_block,
    flat_blocks,
    low_rank_block,
    merged_weight,
)

pytestmark = pytest.mark.unit

SLICES = {"whole": ((0, 30),), "first and last third": ((0, 10), (20, 30)), "inner": ((7, 19),)}


def make_delta(slices=((0, 30),), transposed=False, dtype=torch.float64, inputs=14, rank=3, num_sparse=9):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [torch.randint(*span, (num_sparse,), generator=generator).sort().values for span in slices]
    spec = make_spec((30, inputs), slices, transposed, rank, num_sparse, 1.75)
    return Delta(
        spec,
        a=normal(len(slices) * rank, inputs),
        b=normal(sum(stop - start for start, stop in slices), rank),
        values=normal(len(slices) * num_sparse),
        rows=torch.cat(rows).int(),
        cols=torch.randint(0, inputs, (len(slices) * num_sparse,), generator=generator).int(),
    )


def make_spec(shape, slices, transposed, rank, num_sparse, scaling):
    settings = dict(rank=rank, num_sparse=num_sparse, scaling=scaling)
    return AdapterSpec(shape=shape, transposed=transposed, slices=slices, **settings)


def dense_update(delta, sparse):
    """s * (BA + S2) entry by entry, O x I in float64."""
    outputs, inputs = delta.spec.shape
    rank = delta.b.shape[1]
    update = torch.zeros(outputs, inputs, dtype=torch.float64)
    first = 0
    for k, (start, stop) in enumerate(delta.spec.slices):
        a = delta.a[k * rank : (k + 1) * rank].double()
        for output in range(start, stop):
            update[output] = delta.b[first + output - start].double() @ a
        first += stop - start
    if sparse:
        for row, col, value in zip(
            delta.rows.tolist(), delta.cols.tolist(), delta.values.double(), strict=True
        ):
            update[row, col] += value
    return update * delta.spec.scaling


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_equal_the_dense_formula(slices, transposed, dtype):
    delta = make_delta(slices, transposed, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for block_of, sparse in ((low_rank_block, False), (delta_block, True)):
        expected = dense_update(delta, sparse)
        expected = expected.T if transposed else expected
        for start, stop in ((0, expected.shape[0]), (3, 11), (5, 6)):
            block = block_of(delta, start, stop)
            assert block.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(block.double(), expected[start:stop], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_entries_that_share_a_position_add_up(transposed):
    delta = Delta(
        make_spec((3, 4), ((0, 3),), transposed, 1, 3, 2.0),
        a=torch.zeros(1, 4),
        b=torch.zeros(3, 1),
        values=torch.tensor([1.0, 2.0, 4.0]),
        rows=torch.tensor([2, 2, 0], dtype=torch.int32),
        cols=torch.tensor([1, 1, 3], dtype=torch.int32),
    )
    block = delta_block(delta, 0, delta.storage_shape[0])
    block = block.T if transposed else block
    assert block[2, 1] == 6.0 and block[0, 3] == 8.0 and block.count_nonzero() == 2


def test_zero_outside_the_slices():
    block = delta_block(make_delta(SLICES["inner"]), 0, 30)
    assert not block[:7].any() and not block[19:].any() and block[7:19].all()


def test_factors_are_copied_so_that_a_released_parameter_does_no_harm():
    a = torch.ones(1, 4)
    delta = Delta(
        make_spec((3, 4), ((0, 3),), False, 1, 0, 1.0),
        a=a,
        b=torch.ones(3, 1),
        values=torch.zeros(0),
        rows=torch.zeros(0, dtype=torch.int32),
        cols=torch.zeros(0, dtype=torch.int32),
    )
    a.zero_()
    assert torch.equal(delta_block(delta, 0, 3), torch.ones(3, 4))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    block_entries=st.sampled_from([1, 7, 64, 10**6]),
)
def test_flat_blocks_cover_each_stretch_once_and_start_at_absolute_rows(shape, cuts, block_entries):
    rows, columns = shape
    numel = rows * columns
    edges = sorted([0, numel, *(round(cut * numel) for cut in cuts)])
    step = max(1, block_entries // columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "BLOCK_ENTRIES", block_entries)
        whole = torch.arange(numel)
        seen = []
        for start, stop in itertools.pairwise(edges):
            at = start
            for block in flat_blocks(shape, start, stop - start, torch.device("cpu")):
                assert block.start_row % step == 0
                assert block.stop_row == min(rows, block.start_row + step)
                assert block.start == at and block.numel > 0
                at += block.numel
                seen.append(block.part(whole.view(shape)[block.start_row : block.stop_row]))
            assert at == stop
    assert torch.equal(torch.cat(seen), whole)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 700 * 96), max_size=5), transposed=st.booleans())
def test_update_of_a_stretch_does_not_depend_on_where_the_stretch_begins(cuts, transposed):
    slices = ((0, 100), (500, 700))
    generator = torch.Generator().manual_seed(1)
    delta = Delta(
        make_spec((700, 96), slices, transposed, 16, 10, 0.3),
        a=torch.randn(2 * 16, 96, generator=generator),
        b=torch.randn(300, 16, generator=generator),
        values=torch.randn(20, generator=generator),
        rows=torch.cat([torch.arange(10), torch.arange(600, 610)]).int(),
        cols=torch.arange(20, dtype=torch.int32),
    )

    def stretch(start, stop):
        return [
            block.part(delta_block(delta, block.start_row, block.stop_row))
            for block in flat_blocks(delta.storage_shape, start, stop - start, torch.device("cpu"))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "BLOCK_ENTRIES", 5000)
        whole = torch.cat(stretch(0, 700 * 96))
        edges = sorted([0, 700 * 96, *cuts])
        parts = [part for a, b in itertools.pairwise(edges) for part in stretch(a, b)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_entries", [40, 2**17])
def test_merged_weights_equal_the_dense_formula(slices, transposed, dtype, block_entries, monkeypatch):
    monkeypatch.setattr(delta_module, "BLOCK_ENTRIES", block_entries)
    delta = make_delta(slices, transposed, dtype)
    update = dense_update(delta, sparse=True)
    update = update.T if transposed else update
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(update.shape, generator=generator).to(dtype)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    weight[0, 0] = -0.0
    mask, whole = weight != 0, torch.ones_like(weight, dtype=torch.bool)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for form, expected in {
        "masked": (weight.double() + update) * mask,
        "dense": weight.double() + update,
        "update": update * mask,
    }.items():
        found = merged_weight(weight, delta, pruned=True, form=form)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=tolerance)
        kept = whole if form == "dense" else mask
        assert not found[~kept].any() and not torch.signbit(found[~kept]).any()
        wide = merged_weight(weight, delta, pruned=True, form=form, out=torch.empty(weight.shape).double())
        torch.testing.assert_close(wide, expected, atol=1e-5, rtol=1e-5)
        unmasked = merged_weight(weight, delta, pruned=False, form=form).double()
        torch.testing.assert_close(
            unmasked, update + (form != "update") * weight.double(), atol=1e-5, rtol=tolerance
        )
