"""An update as two thin matrices a slice, D = right @ left, with S2 among their rows where that pays.

N entries of S2 are N more ranks: row n of `left` is 1 at the entry's column, column n of `right` its value at the
entry's row. Then the products with S2 cost no passes of their own over x, y and their gradients. It pays while N is
small and matrix units leave thin products bound by memory: in half precision on GPUs, and on CPUs with AMX.

Shapes: O outputs, I inputs, R rank, N entries of S2 a slice, K slices, S outputs covered by the slices, P = R, or R + N
where S2 is folded in.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.delta import AdapterSpec

MOST_ENTRIES = 128
"""N up to which S2 is folded in; measured with benchmarks/training_step.py."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Where S2's entries stand in the factors.

    Attributes:
        spec: the adapter's with rank P and no entries: slices of the factors.
        in_left: int64 (K*N,) flat positions of the ones in `left`.
        in_right: int64 (K*N,) flat positions of the values in `right`.
    """

    spec: AdapterSpec
    in_left: Tensor
    in_right: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one layer, s * right @ left: the products apply the scaling, which costs them nothing.

    Attributes:
        spec: slices of the factors.
        left: (K*P, I).
        right: (S, P).
        values: (K*N,) entries of S2 that are not within the factors, scaled; None for none.
    """

    spec: AdapterSpec
    left: Tensor
    right: Tensor
    values: Tensor | None


def make_fold(
    spec: AdapterSpec, rows: Tensor, cols: Tensor, most: int = MOST_ENTRIES, multiple: int = 1
) -> Fold | None:
    """Positions for a fixed support; None where there is nothing to fold in, or too much.

    Args:
        spec: the adapter's.
        rows: int32 (K*N,) output index of each entry.
        cols: int32 (K*N,) input index.
        most: entries of a slice that are folded in at most.
        multiple: what a slice's columns are filled up to a multiple of, with zeros.
    """
    count = spec.num_sparse
    wide = -(-(spec.rank + count) // multiple) * multiple
    if count > most or wide == spec.rank:
        return None
    entry = torch.arange(rows.numel(), device=rows.device)
    number, place = entry // max(1, count), spec.rank + entry % max(1, count)
    shift = [of_b.start - start for start, _, _, of_b in spec.per_slice()]
    covered_rows = rows.long() + torch.tensor(shift, device=rows.device)[number]
    return Fold(
        dataclasses.replace(spec, rank=wide, num_sparse=0, shared_a=False),
        (number * wide + place) * spec.shape[1] + cols.long(),
        covered_rows * wide + place,
    )


def folds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether thin products in this dtype are bound by memory here."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return device.type == "cuda" or _has_amx()


def make_factors(flat: Tensor, spec: AdapterSpec, fold: Fold | None, dtype: torch.dtype) -> Factors:
    """The factors in the dtype of the product.

    Args:
        flat: A, B and the values one after the other.
        spec: the adapter's.
        fold: where S2 is folded in, None where it is not.
        dtype: of the factors.
    """
    a, b, values = spec.split(flat.detach().to(dtype))
    if fold is None:
        return Factors(spec, a, b, values * spec.scaling if spec.num_sparse else None)
    more, num_slices = fold.spec.rank - spec.rank, len(spec.slices)
    each = a.view(-1, spec.rank, spec.shape[1]).expand(num_slices, -1, -1)  # a shared A stands in every slice
    left = torch.nn.functional.pad(each, (0, 0, 0, more)).view(fold.spec.shapes[0])
    left.view(-1).index_fill_(0, fold.in_left, 1)
    right = torch.nn.functional.pad(b, (0, more))
    right.view(-1).index_copy_(0, fold.in_right, values)
    return Factors(fold.spec, left, right, None)


def flat_gradient(
    flat: Tensor, spec: AdapterSpec, fold: Fold | None, da: Tensor, dright: Tensor, dvalues: Tensor | None
) -> Tensor:
    """The gradient of A, B and the values in one tensor.

    Args:
        flat: gives dtype and device.
        spec: the adapter's.
        fold: as for `make_factors`.
        da: (K*R, I) gradient of A before the scaling.
        dright: (S, P) gradient of `right` before the scaling.
        dvalues: (K*N,) gradient of the scaled values that are not folded in; None for none.
    """
    gradient = torch.empty_like(flat)
    to_a, to_b, to_values = spec.split(gradient)
    torch.mul(da.view(-1, *to_a.shape).sum(0) if spec.shared_a else da, spec.scaling, out=to_a)
    to_b.copy_(dright[:, : spec.rank] * spec.scaling)
    if fold is not None:
        dvalues = dright.take(fold.in_right)  # needs no contiguous copy
    if spec.num_sparse:
        assert dvalues is not None
        torch.mul(dvalues, spec.scaling, out=to_values)
    return gradient


def low_ranks(dz: Tensor, spec: AdapterSpec) -> Tensor:
    """The columns of (T, K*P) that belong to A, (T, K*R)."""
    num_slices = len(spec.slices)
    if dz.shape[1] == num_slices * spec.rank:
        return dz
    if num_slices == 1:
        return dz[:, : spec.rank]
    wide = dz.shape[1] // num_slices
    return dz.view(len(dz), num_slices, wide)[..., : spec.rank].reshape(len(dz), num_slices * spec.rank)


@functools.cache
def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
