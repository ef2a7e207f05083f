"""The update of one adapted weight, D = s * (B A + S2): the one place with that formula.

Shapes: O outputs, I inputs, R rank, K adapted slices of the outputs, S sum of the slices' widths, N
trained entries of S2 per slice. The *storage layout* of a weight is O x I, or I x O if it is transposed
(transformers' Conv1D); its rows are what a block counts.

A shard is a stretch of a weight's flat order and may begin anywhere. Blocks begin at absolute rows that
depend on the weight's shape alone, and are always computed whole: a matrix product of other rows may
round otherwise, and then a weight would be kept on two ranks and removed on three.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsee_scale.algorithms import bits
from dsee_scale.algorithms.bits import zero_where_zero_

BLOCK_ENTRIES = 2**17
"""Entries of a block, at most (but at least a row): 512 KiB in float32, so that a block and its scores stay
in a core's cache. Part of what fixes the rounding, so the same on every rank."""
DEVICE_BLOCK_ENTRIES = 2**24
"""The same on an accelerator, where a block costs some kernel launches."""

Form = Literal["masked", "dense", "update"]
Shapes = tuple[tuple[int, int], tuple[int, int], tuple[int]]
"""Of A (K*R, I), or (R, I) if it is shared, of B (S, R) and of values (K*N,)."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What is fixed about the adapter of one weight.

    Attributes:
        shape: true (O, I) of the weight.
        transposed: whether the weight is stored I x O.
        slices: K adapted output ranges (start, stop), ascending and apart; ((0, O),) for the whole weight.
        rank: R.
        num_sparse: N of each slice.
        scaling: s = alpha / rank.
        dropout: probability in [0, 1) with which an element of the adapter's input is dropped in training.
        experts: whether each slice is the matrix of one expert, in a parameter of three dimensions (K, O / K, I).
        shared_a: whether all experts use one A; each has its own B and entries of S2.
    """

    shape: tuple[int, int]
    transposed: bool
    slices: tuple[tuple[int, int], ...]
    rank: int
    num_sparse: int
    scaling: float
    dropout: float = 0.0
    experts: bool = False
    shared_a: bool = False

    @property
    def storage_shape(self) -> tuple[int, int]:
        """(O, I), or (I, O) if transposed."""
        outputs, inputs = self.shape
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    @property
    def shapes(self) -> Shapes:
        """Of A, B and the values."""
        covered = sum(stop - start for start, stop in self.slices)
        num_slices = len(self.slices)
        rows_a = self.rank if self.shared_a else num_slices * self.rank
        return (rows_a, self.shape[1]), (covered, self.rank), (num_slices * self.num_sparse,)

    @property
    def width(self) -> int | None:
        """Rows of one expert's matrix; None where the slices are no experts."""
        return self.shape[0] // len(self.slices) if self.experts else None

    @property
    def numel(self) -> int:
        """Entries of A, B and the values together."""
        return sum(map(math.prod, self.shapes))

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the values as views of one tensor (numel,) that holds them one after the other."""
        shape_a, shape_b, shape_values = self.shapes
        a, b, values = flat.split_with_sizes([math.prod(shape_a), math.prod(shape_b), *shape_values])
        return a.view(shape_a), b.view(shape_b), values

    def per_slice(self) -> Iterator[tuple[int, int, slice, slice]]:
        """(start, stop, its rows of A, its rows of B) of each slice."""
        offset = 0
        for k, (start, stop) in enumerate(self.slices):
            first = 0 if self.shared_a else k * self.rank
            yield (
                start,
                stop,
                slice(first, first + self.rank),
                slice(offset, offset + stop - start),
            )
            offset += stop - start


@dataclass(frozen=True, eq=False)
class Delta:
    """What the adapter of one weight holds, copied to float32 (float64 stays float64).

    The copies are small, outlive a gathered parameter, and are aligned alike on every rank.

    Attributes:
        spec: what is fixed about it.
        a: (K*R, I), slice k uses rows k*R to (k+1)*R; (R, I) where the slices share it.
        b: (S, R), the slices' rows one after the other.
        values: (K*N,) entries of S2; entries that share a position add up.
        rows: (K*N,) int32, output index of each value in the full weight.
        cols: (K*N,) int32, input index of each value.
        host_rows: (K*N,) int64 on the CPU, the rows once more, where the entries are sorted by row of the storage
            layout: blocks of rows then find theirs without waiting for an accelerator.
    """

    spec: AdapterSpec
    a: Tensor
    b: Tensor
    values: Tensor
    rows: Tensor
    cols: Tensor
    host_rows: Tensor | None = None

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.a.dtype == torch.float64 else torch.float32
        for name in ("a", "b", "values"):
            factor = getattr(self, name).detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            object.__setattr__(self, name, factor)
        assert (self.a.shape, self.b.shape, self.values.shape) == self.spec.shapes, self.spec
        assert self.values.shape == self.rows.shape == self.cols.shape

    @classmethod
    def of(
        cls, spec: AdapterSpec, flat: Tensor, rows: Tensor, cols: Tensor, host_rows: Tensor | None = None
    ) -> Delta:
        """From A, B and the values in one tensor, as `AdapterSpec.split` has them."""
        return cls(spec, *spec.split(flat), rows, cols, host_rows)

    @property
    def storage_shape(self) -> tuple[int, int]:
        """(O, I), or (I, O) if transposed."""
        return self.spec.storage_shape

    def of_expert(self, expert: int) -> Delta:
        """One expert's update, of its own matrix."""
        start, stop, of_a, of_b = next(itertools.islice(self.spec.per_slice(), expert, None))
        spec = dataclasses.replace(
            self.spec,
            shape=(stop - start, self.spec.shape[1]),
            slices=((0, stop - start),),
            experts=False,
            shared_a=False,
        )
        own = slice(expert * spec.num_sparse, (expert + 1) * spec.num_sparse)
        return Delta(
            spec, self.a[of_a], self.b[of_b], self.values[own], self.rows[own] - start, self.cols[own]
        )

    @property
    def stored_positions(self) -> tuple[Tensor, Tensor]:
        """int64 rows and columns of S2's entries in the storage layout."""
        rows, cols = self.rows.long(), self.cols.long()
        return (cols, rows) if self.spec.transposed else (rows, cols)

    @functools.cached_property
    def _by_stored_row(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S2's entries sorted by row of the storage layout: rows (a copy of them on the CPU), columns, values."""
        rows, cols = self.stored_positions
        if self.host_rows is not None:
            return self.host_rows, rows, cols, self.values
        order = torch.argsort(rows, stable=True)
        return rows[order].cpu(), rows[order], cols[order], self.values[order]


def low_rank_block(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """s * B A, rows start_row to stop_row of the storage layout, (stop_row - start_row, columns)."""
    return _low_rank(delta, start_row, stop_row).mul_(delta.spec.scaling)


def delta_block(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """D = s * (B A + S2), rows start_row to stop_row of the storage layout."""
    block = _low_rank(delta, start_row, stop_row)
    return _add_sparse_(block, delta, start_row, stop_row).mul_(delta.spec.scaling)


def _low_rank(delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """B A without the scaling, zero outside the slices."""
    block = delta.a.new_zeros(stop_row - start_row, delta.storage_shape[1])
    for part, left, right in _factors(delta, block, start_row, stop_row):
        torch.matmul(left, right, out=part)
    return block


def _factors(
    delta: Delta, block: Tensor, start_row: int, stop_row: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(view of the block's part in a slice, left, right): B A is left @ right there. Whole experts go together."""
    spec, width = delta.spec, delta.spec.width
    if width and start_row % width == stop_row % width == 0:
        here = slice(start_row // width, stop_row // width)
        a_KRI, b_KWR = delta.a.view(-1, spec.rank, block.shape[1]), delta.b.view(-1, width, spec.rank)[here]
        a_KRI = a_KRI.expand(len(b_KWR), -1, -1) if spec.shared_a else a_KRI[here]
        yield block.view(len(b_KWR), width, -1), b_KWR, a_KRI
        return
    for start, stop, of_a, of_b in _slices_between(spec, start_row, stop_row):
        a_RI, b_OR = delta.a[of_a], delta.b[of_b]
        if delta.spec.transposed:
            yield block[:, start:stop], a_RI[:, start_row:stop_row].T, b_OR.T
            continue
        first, last = max(start, start_row), min(stop, stop_row)
        if first < last:
            yield block[first - start_row : last - start_row], b_OR[first - start : last - start], a_RI


def _slices_between(
    spec: AdapterSpec, start_row: int, stop_row: int
) -> Iterable[tuple[int, int, slice, slice]]:
    """The slices that rows of the storage layout lie in, of many experts a few."""
    if spec.width is None:
        return spec.per_slice()
    return itertools.islice(spec.per_slice(), start_row // spec.width, -(-stop_row // spec.width))


def _add_sparse_(
    block: Tensor, delta: Delta, start_row: int, stop_row: int, scaling: float | None = None
) -> Tensor:
    """block += S2, or scaling * S2."""
    if not delta.values.numel():
        return block
    first, last = 0, delta.values.numel()
    if (start_row, stop_row) == (0, delta.storage_shape[0]):
        rows, cols, values = *delta.stored_positions, delta.values
    else:
        host_rows, rows, cols, values = delta._by_stored_row
        first, last = torch.searchsorted(host_rows, torch.tensor([start_row, stop_row])).tolist()
    if first < last:
        found = values[first:last] if scaling is None else values[first:last] * scaling
        block.index_put_((rows[first:last] - start_row, cols[first:last]), found, accumulate=True)
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


def block_entries(device: torch.device) -> int:
    """Entries of a block on a device: what fits a cache, or what keeps an accelerator busy."""
    return BLOCK_ENTRIES if bits.is_host(device) else DEVICE_BLOCK_ENTRIES


def flat_blocks(shape: tuple[int, int], start: int, numel: int, device: torch.device) -> Iterator[FlatBlock]:
    """The blocks that a stretch touches, in order; the parts together are the stretch.

    Args:
        shape: (rows, columns) of the weight as it is stored.
        start: flat position where the stretch begins.
        numel: its length; 0 gives no block.
        device: where it lies; on every rank of the same kind, since blocks fix the rounding.
    """
    rows, columns = shape
    stop = start + numel
    assert start >= 0 and stop <= rows * columns, (shape, start, numel)
    step = max(1, block_entries(device) // max(1, columns))
    while start < stop:
        row = start // columns // step * step
        last = min(row + step, rows)
        end = min(stop, last * columns)
        yield FlatBlock(row, last, start - row * columns, start, end - start)
        start = end


def merged_weight(
    weight: Tensor, delta: Delta, *, pruned: bool, form: Form, out: Tensor | None = None
) -> Tensor:
    """The weight with its update, as it is trained and as it is exported; computed block by block in float32.

    Args:
        weight: W, whole, in its storage layout, of experts (E, M, J) too; not changed.
        delta: D.
        pruned: whether the weight's zeros are its mask M; otherwise M keeps all.
        form: `masked` gives (W + D) * M, as sparse as W; `dense` gives W * M + D; `update` gives D * M.
        out: filled and returned; of W's shape, in any dtype. None makes one on the CPU, in W's dtype.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype)
    if weight.dim() == 3:
        merged_weight(weight.flatten(0, 1), delta, pruned=pruned, form=form, out=out.flatten(0, 1))
        return out
    rows, columns = delta.storage_shape
    device = delta.a.device
    step = rows if torch.compiler.is_compiling() else max(1, block_entries(device) // columns)
    if delta.spec.width and step >= delta.spec.width:
        step -= step % delta.spec.width
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        w, target = weight[start:stop].to(device), out[start:stop]
        # A copy, since the products' rounding may depend on where a row begins in memory.
        block = delta.a.new_zeros(w.shape) if form == "update" else w.to(delta.a.dtype, copy=True)
        for part, left, right in _factors(delta, block, start, stop):
            add = part.addmm_ if part.dim() == 2 else part.baddbmm_
            add(left, right, alpha=delta.spec.scaling)
        _add_sparse_(block, delta, start, stop, delta.spec.scaling)
        masks = pruned and form != "dense"
        early = masks and (device.type != "cpu" or block.element_size() == w.element_size())
        target.copy_(zero_where_zero_(block, w) if early else block)
        if masks and not early:
            zero_where_zero_(target, w)
    return out
