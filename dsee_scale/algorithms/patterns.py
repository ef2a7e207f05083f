"""Zeros with a structure: N of each M inputs, and whole units (attention heads, feed-forward neurons).

N:M chooses inside small groups, by the same keys as unstructured pruning (`score.keys`), ties by position.

A unit is a set of outputs of some matrices and inputs of others. Its score is the sum of its entries'
scores. No process may hold all entries, and floating-point sums depend on their order; so scores are added
as whole multiples of a power of two, in int64, where sums are exact and the order is all the same.

*Storage layout* and *flat order* are those of `delta`: a weight is (rows, columns) as stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.delta import block_entries, flat_blocks
from dsee_scale.algorithms.score import Ranking, block_scores, keys, ranked_blocks

SMALL_GROUP = 32
"""Groups of up to so many entries are compared pair by pair, longer ones by selection."""
EXPONENTS = 512
"""Length of a one-hot vector that holds the exponent of any float32 score."""
_ZERO_EXPONENT = 256


def lowest_in_groups(group_keys: Tensor, num_remove: int) -> Tensor:
    """Which entries of each group go: those with the lowest keys, of equal ones the first.

    Args:
        group_keys: (groups, M, stride) integers; a group is a line along dimension 1.
        num_remove: M - N, how many of each group go.

    Returns:
        bool, in the shape of `group_keys`, exactly `num_remove` of each group True.
    """
    if group_keys.shape[1] > SMALL_GROUP:
        return _lowest_in_rows(group_keys, num_remove)
    by_place = group_keys.movedim(1, 0).contiguous()
    before = torch.zeros(by_place.shape, dtype=torch.int16, device=group_keys.device)
    for later in range(1, len(by_place)):
        for earlier in range(later):
            first = by_place[earlier] <= by_place[later]
            before[later] += first
            before[earlier] += ~first
    return (before < num_remove).movedim(0, 1)


def _lowest_in_rows(group_keys: Tensor, num_remove: int) -> Tensor:
    """The same for long groups: the threshold of each by selection, then ties in order."""
    if not num_remove:
        return torch.zeros(group_keys.shape, dtype=torch.bool, device=group_keys.device)
    threshold = group_keys.kthvalue(num_remove, dim=1, keepdim=True).values
    gone, tied = group_keys < threshold, group_keys == threshold
    wanted = num_remove - gone.sum(1, keepdim=True)
    if not torch.equal(wanted, tied.sum(1, keepdim=True)):
        tied &= tied.cumsum(1, dtype=torch.int32) <= wanted
    return gone | tied


def key_blocks(weight: Tensor, start: int, ranking: Ranking) -> Iterator[tuple[Tensor, int]]:
    """(int32 keys, flat position) of one stored stretch of a weight, in order; extra memory: a few blocks."""
    for _, ranked, position in ranked_blocks(weight, start, ranking):
        if not ranked.is_floating_point():
            yield ranked, position
            continue
        for part in ranked.split(block_entries(ranked.device)):
            yield keys(part.float().abs(), part), position
            position += part.numel()


def whole_slabs(blocks: Iterable[tuple[Tensor, int]], slab: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a stream of consecutive blocks anew, so that each one holds whole slabs.

    Args:
        blocks: (entries, position), the first position and the total length multiples of `slab`.
        slab: entries that belong together.
    """
    left: list[Tensor] = []
    waiting = 0
    for entries, position in blocks:
        whole = (waiting + entries.numel()) // slab * slab - waiting
        if whole > 0:
            first = position - waiting
            yield torch.cat([*left, entries[:whole]]) if left else entries[:whole], first
            left, waiting, entries = [], 0, entries[whole:]
        if entries.numel():
            left.append(entries)
            waiting += entries.numel()
    assert not waiting, "the stream ends within a slab"


def score_blocks(weight: Tensor, start: int, ranking: Ranking) -> Iterator[tuple[Tensor, int]]:
    """(float32 scores, flat position) of one stored stretch; modes NAB and NABS as AB and ABS.

    As in `score.ranked_blocks`, no score depends on where the stretch begins.
    """
    ranking = dataclasses.replace(ranking, mode=ranking.mode.removeprefix("N"))  # type: ignore[arg-type]
    if ranking.by_magnitude:
        for part in weight.split(block_entries(weight.device)):
            yield part.float().abs(), start
            start += part.numel()
        return
    shape = ranking.shape if ranking.delta is None else ranking.delta.storage_shape
    for block in flat_blocks(shape, start, weight.numel(), weight.device):
        entries = weight[block.start - start : block.start - start + block.numel]
        yield block_scores(ranking, entries, block), block.start


def largest_exponent(blocks: Iterable[tuple[Tensor, int]]) -> Tensor:
    """One-hot (EXPONENTS,) int64: e of the largest score m * 2**e here, m in [0.5, 1). Sum it over ranks.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    maxima = [part.max() for part, _ in blocks if part.numel()]
    largest = float(torch.stack(maxima).max()) if maxima else 0.0
    if not math.isfinite(largest):
        raise ValueError("a score is NaN or infinite: the weights or the adapter hold NaN or infinity")
    found = torch.zeros(EXPONENTS, dtype=torch.int64)
    found[_ZERO_EXPONENT + math.frexp(largest)[1] if largest else 0] = 1
    return found


def fixed_point_shift(exponents: Tensor, num_entries: int) -> int:
    """k such that sums of up to `num_entries` scores, in multiples of 2**-k, fit into int64.

    Args:
        exponents: (EXPONENTS,) what `largest_exponent` found, summed over ranks.
        num_entries: entries of the largest sum.
    """
    highest = int(exponents.nonzero().max()) - _ZERO_EXPONENT
    return 61 - highest - max(1, num_entries).bit_length()


def fixed_point(found: Tensor, shift: int) -> Tensor:
    """Scores as the nearest multiples of 2**-shift, int64."""
    return (found.double() * 2.0**shift).round_().long()


@dataclass(frozen=True)
class Piece:
    """A rectangle of a weight, at `skip` in a stretch of its flat order.

    Attributes:
        skip: entries of the stretch before it.
        row: its first row.
        column: its first column.
        shape: its rows and columns.
    """

    skip: int
    row: int
    column: int
    shape: tuple[int, int]

    def view(self, stretch: Tensor) -> Tensor:
        """The rectangle as a view of the stretch."""
        return stretch[self.skip : self.skip + self.shape[0] * self.shape[1]].view(self.shape)


def pieces(start: int, numel: int, columns: int) -> Iterator[Piece]:
    """A stretch of the flat order as rectangles: the end of a row, whole rows, the beginning of a row."""
    skip = 0
    while skip < numel:
        row, column = divmod(start + skip, columns)
        left = numel - skip
        shape = (1, min(columns - column, left)) if column or left < columns else (left // columns, columns)
        yield Piece(skip, row, column, shape)
        skip += shape[0] * shape[1]


def add_along_axis(values: Tensor, start: int, columns: int, axis: int, sums: Tensor) -> None:
    """Add a stretch of int64 values to sums by row (axis 0) or by column (axis 1).

    Args:
        values: (n,) int64, a stretch of the flat order.
        start: flat position of `values[0]`.
        columns: of the whole weight.
        axis: 0 or 1.
        sums: (rows,) or (columns,) int64, added to.
    """
    for piece in pieces(start, values.numel(), columns):
        first = (piece.row, piece.column)[axis]
        sums[first : first + piece.shape[axis]] += piece.view(values).sum(dim=1 - axis)


def zero_along_axis_(stretch: Tensor, start: int, columns: int, axis: int, gone: Tensor) -> None:
    """Zero, in place, the rows (axis 0) or columns (axis 1) of a stretch where `gone` is True.

    Args:
        stretch: (n,) stored entries.
        start: flat position of `stretch[0]`.
        columns: of the whole weight.
        axis: 0 or 1.
        gone: (rows,) or (columns,) bool.
    """
    for piece in pieces(start, stretch.numel(), columns):
        first = (piece.row, piece.column)[axis]
        part = gone[first : first + piece.shape[axis]]
        piece.view(stretch).masked_fill_(part[:, None] if axis == 0 else part[None, :], 0)


def unit_sums(sums: Tensor, unit_of: Tensor, num_units: int) -> Tensor:
    """Sums by row or column, added up by unit.

    Args:
        sums: (n,) int64.
        unit_of: (n,) int64, the unit of each row or column, -1 for none.
        num_units: U.

    Returns:
        (U,) int64.
    """
    inside = unit_of >= 0
    return torch.zeros(num_units, dtype=torch.int64).index_add_(0, unit_of[inside], sums[inside])


def lowest_units(unit_scores: Tensor, num_remove: int) -> Tensor:
    """(U,) bool: the units of one layer that go, the lowest scores first, ties by position."""
    gone = torch.zeros(len(unit_scores), dtype=torch.bool)
    gone[torch.sort(unit_scores, stable=True).indices[:num_remove]] = True
    return gone


def lowest_units_overall(
    layer_scores: Sequence[Tensor], before: Sequence[Tensor], num_remove: int, floor: int
) -> list[Tensor]:
    """The units that are gone under one budget for all layers, of which no more go where `floor` are left.

    Args:
        layer_scores: (U,) of each layer; U may differ.
        before: (U,) bool of each layer, what is gone already; it counts.
        num_remove: units that are gone in all; at most what the floor leaves.
        floor: units that stay in each layer.

    Returns:
        (U,) bool of each layer, `before` included; ties go by layer, then by position.
    """
    sizes = [len(found) for found in layer_scores]
    gone = [found.clone() for found in before]
    counts = [sum(found.tolist()) for found in gone]
    spare = [size - floor - count for size, count in zip(sizes, counts, strict=True)]
    left = num_remove - sum(counts)
    assert left <= sum(max(0, each) for each in spare), (num_remove, sizes, floor)
    places = [(layer, unit) for layer, size in enumerate(sizes) for unit in range(size)]
    for place in torch.sort(torch.cat(list(layer_scores)), stable=True).indices.tolist():
        layer, unit = places[place]
        if left > 0 and spare[layer] > 0 and not gone[layer][unit]:
            gone[layer][unit] = True
            spare[layer] -= 1
            left -= 1
    return gone


def groups_hold(weight: Tensor, n: int, m: int, *, transposed: bool = False) -> bool:
    """Whether at most N of each M neighbours along the input are not zero.

    Args:
        weight: (O, I), or (I, O) if transposed.
        n: N.
        m: M, a divisor of I.
        transposed: whether the weight is stored I x O.
    """
    by_output = weight.T if transposed else weight
    kept = (by_output != 0).reshape(by_output.shape[0], -1, m).sum(dim=-1)
    return bool((kept <= n).all())
