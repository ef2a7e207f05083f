"""(W + s (B A + S2)) * M, or D * M, formed tile by tile on a GPU: W is read once and the result written once.

The twin of `merged_weight(pruned=True)`: the sums are in float32 and rounded once, in another order. Runs on CPU
tensors through Triton's interpreter, as `triton_kernels` does.

Shapes: rows and columns of the storage layout, R rank, N entries of S2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsee_scale.algorithms.current_gpu import on_its_gpu
from dsee_scale.algorithms.delta import AdapterSpec

BLOCK_M, BLOCK_N = 64, 128
MAX_BLOCK_R = {"tf32": 64, "ieee": 16}
"""Of the rank at a time, so that the factors' tiles fit into shared memory whatever the rank is; products in float32
take no tensor core and compile three times as long with 64."""


@on_its_gpu
def merge_under_mask_(
    out: Tensor, weight: Tensor, flat: Tensor, rows: Tensor, cols: Tensor, spec: AdapterSpec, *, base: bool
) -> None:
    """Fill `out`.

    Args:
        out: of W's shape; any floating dtype.
        weight: W in its storage layout; its zeros are the mask.
        flat: A, B and the values one after the other.
        rows: int32 (K*N,) output index of each entry of S2.
        cols: int32 (K*N,) input index.
        spec: the adapter's.
        base: whether W is part of the sum.
    """
    a, b, values = spec.split(flat)
    if spec.slices != ((0, spec.shape[0]),):
        out.copy_(weight) if base else out.zero_()
    for start, stop, of_a, of_b in spec.per_slice():
        left, right = b[of_b], a[of_a]
        cut = (slice(None), slice(start, stop)) if spec.transposed else (slice(start, stop), slice(None))
        if spec.transposed:
            left, right = right.t(), left.t()
        _tiles(out[cut], weight[cut], left, right, spec.scaling, base)
    if values.numel():
        _entries(out, weight, (a, b, values), rows, cols, spec, base)


def _tiles(out: Tensor, weight: Tensor, left: Tensor, right: Tensor, scaling: float, base: bool) -> None:
    """out = (base * weight + scaling * left @ right) * (weight != 0)."""
    num_rows, num_cols = out.shape
    rank = left.shape[1]
    grid = (triton.cdiv(num_rows, BLOCK_M), triton.cdiv(num_cols, BLOCK_N))
    precision = "ieee" if left.dtype == torch.float32 else "tf32"  # which holds 16-bit floats exactly
    block_r = min(MAX_BLOCK_R[precision], max(16, triton.next_power_of_2(rank)))
    _merge_tiles[grid](
        out, weight, left, right,
        num_rows, num_cols, rank, float(scaling),
        out.stride(0), out.stride(1), weight.stride(0), weight.stride(1),
        left.stride(0), left.stride(1), right.stride(0), right.stride(1),
        BASE=base, PRECISION=precision, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=block_r,
    )  # fmt: skip


def _entries(
    out: Tensor,
    weight: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    cols: Tensor,
    spec: AdapterSpec,
    base: bool,
) -> None:
    """The entries of S2 anew, each by one program: rounded once, like all others."""
    a, b, values = factors
    out_OI, weight_OI = (out.t(), weight.t()) if spec.transposed else (out, weight)
    for k, (start, _, of_a, of_b) in enumerate(spec.per_slice()):
        first = k * spec.num_sparse
        here = slice(first, first + spec.num_sparse)
        _merge_entries[(spec.num_sparse,)](
            out_OI, weight_OI, a[of_a], b[of_b], values[here], rows[here], cols[here],
            start, spec.rank, float(spec.scaling),
            out_OI.stride(0), out_OI.stride(1), weight_OI.stride(0), weight_OI.stride(1),
            a.stride(0), a.stride(1), b.stride(0), b.stride(1),
            BASE=base, BLOCK_R=max(16, triton.next_power_of_2(spec.rank)),
        )  # fmt: skip


@triton.jit
def _merge_tiles(
    out, weight, left, right,
    num_rows, num_cols, rank, scaling,
    out_m, out_n, weight_m, weight_n, left_m, left_r, right_r, right_n,
    BASE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    here = (m[:, None] < num_rows) & (n[None, :] < num_cols)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        thin_left = tl.load(
            left + m[:, None] * left_m + r[None, :] * left_r,
            mask=(m[:, None] < num_rows) & (r[None, :] < rank), other=0.0,
        )  # fmt: skip
        thin_right = tl.load(
            right + r[:, None] * right_r + n[None, :] * right_n,
            mask=(r[:, None] < rank) & (n[None, :] < num_cols), other=0.0,
        )  # fmt: skip
        total += tl.dot(thin_left.to(tl.float32), thin_right.to(tl.float32), input_precision=PRECISION)
    total *= scaling
    w = tl.load(weight + m[:, None] * weight_m + n[None, :] * weight_n, mask=here, other=0.0).to(tl.float32)
    if BASE:
        total += w
    total = tl.where(w != 0.0, total, 0.0)
    tl.store(out + m[:, None] * out_m + n[None, :] * out_n, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _merge_entries(
    out, weight, a, b, values, rows, cols,
    start, rank, scaling,
    out_o, out_i, weight_o, weight_i, a_r, a_i, b_o, b_r,
    BASE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    col = tl.load(cols + entry).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    left = tl.load(b + (row - start) * b_o + r * b_r, mask=r < rank, other=0.0).to(tl.float32)
    right = tl.load(a + r * a_r + col * a_i, mask=r < rank, other=0.0).to(tl.float32)
    total = (tl.sum(left * right, 0) + tl.load(values + entry).to(tl.float32)) * scaling
    w = tl.load(weight + row * weight_o + col * weight_i).to(tl.float32)
    if BASE:
        total += w
    total = tl.where(w != 0.0, total, 0.0)
    tl.store(out + row * out_o + col * out_i, total.to(out.dtype.element_ty))
