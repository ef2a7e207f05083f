"""Where the entries of S2 are, prepared for the products that run over them.

Both products, from input columns to output rows and back, are the same sum with rows and columns swapped:
`target += values * source`. A `Route` is that sum prepared for one direction.

Shapes: T tokens, O outputs, I inputs, N entries of S2 (over all slices), U distinct targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsee_scale.algorithms.current_gpu import has_triton
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.errors import TargetError

Method = Literal["gather", "bags", "triton"]


def choose_method(num_entries: int, shape: tuple[int, int], device: torch.device) -> Method:
    """The fastest method, by measurement (benchmarks/sparse_residual.py).

    `gather` touches N elements a token, with strides. `bags` transposes x and y so that each entry is a
    contiguous multiply-add over tokens, which pays once the entries outnumber what is transposed. On a GPU
    Triton does either, and `bags` stands in where Triton is missing: `gather` would need atomics there.
    """
    if device.type == "cuda":
        return "triton" if has_triton() else "bags"
    return "gather" if num_entries <= sum(shape) // 4 else "bags"


@dataclass(frozen=True, eq=False)
class Route:
    """One direction of the product: `target[:, row of e] += values[e] * source[:, column of e]`.

    Attributes:
        source: (N,) column of the source for each entry.
        order: (N,) position in S2's own order of each entry, None where the orders agree.
        targets: (U,) distinct columns of the target; in the entries' order where there is no `group`.
        group: (N,) which of `targets` each entry goes to, None where each has its own. `gather` only.
        starts: (U + 1,) where each target's entries begin. `bags` and `triton` only.
    """

    source: Tensor
    order: Tensor | None
    targets: Tensor
    group: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreparedSupport:
    """Where S2's entries are, with what the products need precomputed: a few int vectors of length N.

    Attributes:
        rows: int32 (N,) output index of each entry; the very tensor that it was made from.
        cols: int32 (N,) input index.
        forward: from input columns to output rows.
        backward: from output rows to input columns.
        method: how the products are computed.
        transposed: whether they run on transposed activations; always true for `bags`.
    """

    rows: Tensor
    cols: Tensor
    forward: Route
    backward: Route
    method: Method
    transposed: bool


def prepare(
    rows: Tensor, cols: Tensor, shape: tuple[int, int], method: Method | None = None
) -> PreparedSupport:
    """Precompute for a fixed support. Reads values, so it synchronises with a GPU: call it once.

    Args:
        rows: int32 (N,) output indices, ascending.
        cols: int32 (N,) input indices.
        shape: (O, I).
        method: None chooses the fastest.
    """
    method = method or choose_method(rows.numel(), shape, rows.device)
    if method == "gather":
        rows_long, cols_long = rows.long(), cols.long()
        forward, backward = _gather_route(cols_long, rows_long), _gather_route(rows_long, cols_long)
    else:
        by_col = torch.argsort(cols, stable=True)
        targets = method == "triton"
        forward = _sorted_route(cols, rows, None, shape[0], targets)
        backward = _sorted_route(rows[by_col], cols[by_col], by_col.int(), shape[1], targets)
    transposed = method == "bags" or (method == "triton" and rows.numel() > sum(shape) // 4)
    return PreparedSupport(rows, cols, forward, backward, method, transposed)


def _gather_route(source: Tensor, target: Tensor) -> Route:
    """A route for `gather`, whose indices are int64 because PyTorch's gather takes nothing else."""
    targets, group = torch.unique(target, return_inverse=True)
    if targets.numel() == target.numel():
        return Route(source, None, target)
    return Route(source, None, targets, group)


def _sorted_route(source: Tensor, target: Tensor, order: Tensor | None, size: int, skip_empty: bool) -> Route:
    """A route with the entries grouped by target; all of the targets, or those that have entries."""
    counts = torch.bincount(target, minlength=size)
    targets = torch.arange(size, dtype=torch.int32, device=target.device)
    if skip_empty:
        targets, counts = targets[counts > 0], counts[counts > 0]
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=target.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return Route(source, order, targets, starts=starts)


def check_support(spec: AdapterSpec, rows: Tensor, cols: Tensor) -> None:
    """Refuse slices and positions of S2 that do not fit the shape or are not in order."""
    shape, slices = spec.shape, spec.slices
    bounds = [0, *(edge for pair in slices for edge in pair), shape[0]]
    if not slices or bounds != sorted(bounds) or any(start == stop for start, stop in slices):
        raise TargetError(f"slices {slices} are not ascending ranges within the {shape[0]} outputs")
    expected = spec.shapes[2]
    if rows.shape != expected or cols.shape != expected:
        raise TargetError(
            f"support of {tuple(rows.shape)} rows and {tuple(cols.shape)} columns, expected {expected[0]} of both: "
            f"{spec.num_sparse} for each of {len(slices)} slices"
        )
    if not spec.num_sparse:
        return
    rows_KN = rows.detach().cpu().long().view(len(slices), -1)
    lows, highs = torch.tensor(slices).split(1, dim=1)
    if bool(((rows_KN < lows) | (rows_KN >= highs)).any()):
        raise TargetError(f"the support has rows outside of the slices {slices}")
    cols_KN = cols.detach().cpu().long().view(len(slices), -1)
    order_KN = rows_KN * shape[1] + cols_KN
    if bool(((cols_KN < 0) | (cols_KN >= shape[1])).any()) or bool((order_KN.diff(dim=1) <= 0).any()):
        raise TargetError(
            "the support's entries are not distinct, within the inputs, and sorted by (row, column)"
        )
