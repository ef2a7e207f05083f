"""The update of one adapted weight, D = s * (B A + S2): the one place with that formula.

Shapes: O outputs, I inputs, R rank, K adapted slices of the outputs, S sum of the slices' widths, N
trained entries of S2 per slice. The *storage layout* of a weight is O x I, or I x O if it is transposed
(transformers' Conv1D); its rows are what a block counts.

A shard is a stretch of a weight's flat order and may begin anywhere. Blocks begin at absolute rows that
depend on the weight's shape alone, and are always computed whole: a matrix product of other rows may
round otherwise, and then a weight would be kept on two ranks and removed on three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**17
"""Entries of a block, at most (but at least a row): 512 KiB in float32, so that a block and its scores stay
in a core's cache. Part of what fixes the rounding, so the same everywhere."""

Form = Literal["masked", "dense"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta:
    """What the adapter of one weight holds, copied to float32 (float64 stays float64).

    The copies are small, outlive a gathered parameter, and are aligned alike on every rank.

    Attributes:
        a: (K*R, I), slice k uses rows k*R to (k+1)*R.
        b: (S, R), the slices' rows one after the other.
        values: (K*N,) entries of S2; entries that share a position add up.
        rows: (K*N,) int32, output index of each value in the full weight.
        cols: (K*N,) int32, input index of each value.
        slices: (start, stop) output ranges, ascending, disjoint; ((0, O),) for the whole weight.
        scaling: s = alpha / rank.
        shape: (O, I).
        transposed: whether the weight is stored I x O.
    """

    a: Tensor
    b: Tensor
    values: Tensor
    rows: Tensor
    cols: Tensor
    slices: tuple[tuple[int, int], ...]
    scaling: float
    shape: tuple[int, int]
    transposed: bool = False

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.a.dtype == torch.float64 else torch.float32
        for name in ("a", "b", "values"):
            factor = getattr(self, name).detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            object.__setattr__(self, name, factor)
        width = sum(stop - start for start, stop in self.slices)
        rank = self.b.shape[1]
        assert self.a.shape == (len(self.slices) * rank, self.shape[1]), (self.a.shape, self.slices, rank)
        assert self.b.shape[0] == width, (self.b.shape, self.slices)
        assert self.values.shape == self.rows.shape == self.cols.shape

    @property
    def storage_shape(self) -> tuple[int, int]:
        """(O, I), or (I, O) if transposed."""
        outputs, inputs = self.shape
        return (inputs, outputs) if self.transposed else (outputs, inputs)


def low_rank_block(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """s * B A, rows start_row to stop_row of the storage layout, (stop_row - start_row, columns)."""
    return _low_rank(delta, start_row, stop_row).mul_(delta.scaling)


def delta_block(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """D = s * (B A + S2), rows start_row to stop_row of the storage layout."""
    block = _low_rank(delta, start_row, stop_row)
    stored_rows, stored_cols = (delta.cols, delta.rows) if delta.transposed else (delta.rows, delta.cols)
    here = ((stored_rows >= start_row) & (stored_rows < stop_row)).nonzero().flatten()
    at = (stored_rows[here].long() - start_row, stored_cols[here].long())
    return block.index_put_(at, delta.values[here], accumulate=True).mul_(delta.scaling)


def _low_rank(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """B A without the scaling, zero outside the slices."""
    rank = delta.b.shape[1]
    block = delta.a.new_zeros(stop_row - start_row, delta.storage_shape[1])
    offset = 0
    for k, (start, stop) in enumerate(delta.slices):
        a_RI = delta.a[k * rank : (k + 1) * rank]
        b_OR = delta.b[offset : offset + stop - start]
        offset += stop - start
        if delta.transposed:
            torch.mm(a_RI[:, start_row:stop_row].T, b_OR.T, out=block[:, start:stop])
            continue
        first, last = max(start, start_row), min(stop, stop_row)
        if first < last:
            torch.mm(
                b_OR[first - start : last - start], a_RI, out=block[first - start_row : last - start_row]
            )
    return block


@dataclass(frozen=True)
class FlatBlock:
    """A block of rows, and the part of it that lies in a stretch of the flat order.

    Attributes:
        start_row: first row of the whole block.
        stop_row: one past its last row.
        skip: entries of the block before the part.
        start: flat position of the part's first entry in the weight.
        numel: entries of the part.
    """

    start_row: int
    stop_row: int
    skip: int
    start: int
    numel: int

    def part(self, block: Tensor) -> Tensor:
        """The part's entries, 1-D, of a whole block (stop_row - start_row, columns)."""
        return block.reshape(-1)[self.skip : self.skip + self.numel]


def flat_blocks(shape: tuple[int, int], start: int, numel: int) -> Iterator[FlatBlock]:
    """The blocks that a stretch touches, in order; the parts together are the stretch.

    Args:
        shape: (rows, columns) of the weight as it is stored.
        start: flat position where the stretch begins.
        numel: its length; 0 gives no block.
    """
    rows, columns = shape
    stop = start + numel
    assert start >= 0 and stop <= rows * columns, (shape, start, numel)
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    while start < stop:
        row = start // columns // step * step
        last = min(row + step, rows)
        end = min(stop, last * columns)
        yield FlatBlock(row, last, start - row * columns, start, end - start)
        start = end


def combine(weight: Tensor, delta: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """One weight block for export, in the weight's dtype; computed in the update's.

    Args:
        weight: entries of W, any shape.
        delta: entries of D at the same places.
        mask: bool, True where W is kept; None keeps all.
        form: "masked" gives (W + D) * M, as sparse as W; "dense" gives W * M + D.
    """
    base = weight.to(delta.dtype)
    if mask is None:
        return (base + delta).to(weight.dtype)
    if form == "masked":
        return (base + delta).masked_fill(~mask, 0).to(weight.dtype)
    return (base.masked_fill(~mask, 0) + delta).to(weight.dtype)
