"""GPU kernels of the sparse residual, in Triton: the product over a route, and the gradient of the values.

Neither uses atomics: a program owns its targets (or its entry) and adds up in a fixed order, in float32. The
same kernels serve activations as they are, (tokens, columns), where reads are strided but few, and transposed
copies, (columns, tokens), where reads are contiguous: strides are arguments.

They also run on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1, set before the first import).

Shapes: T tokens, N entries, U distinct targets, M and J the widths of target and source.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsee_scale.adapters.support import Route
from dsee_scale.algorithms.current_gpu import on_its_gpu

BLOCK_T = 128
BLOCK_T_WIDE = 512
"""Tokens per program: in `accumulate_`, and in `value_gradient_`."""


@on_its_gpu
def accumulate_(
    target_TM: Tensor, source_TJ: Tensor, values_N: Tensor, route: Route, transposed: bool
) -> None:
    """`target[:, targets[u]] += sum over u's entries of values * source[:, column]`, in place.

    Args:
        target_TM: any strides.
        source_TJ: any strides.
        values_N: in S2's own order.
        route: with `starts`.
        transposed: copy the source to (J, T) and collect the sums as (M, T): contiguous reads.
    """
    assert route.starts is not None
    values_N = values_N if route.order is None else values_N.index_select(0, route.order)
    num_tokens, num_targets = source_TJ.shape[0], route.targets.numel()
    grid = (num_targets, triton.cdiv(num_tokens, BLOCK_T))
    if not transposed:
        _accumulate[grid](
            target_TM, source_TJ, values_N, route.source, route.targets, route.starts,
            num_tokens, target_TM.stride(0), target_TM.stride(1), source_TJ.stride(0), source_TJ.stride(1),
            BLOCK_T=BLOCK_T, WIDE=_wide(source_TJ),
        )  # fmt: skip
        return
    source_JT = source_TJ.t().contiguous()
    sums_MT = torch.zeros(target_TM.shape[::-1], dtype=target_TM.dtype, device=target_TM.device)
    _accumulate[grid](
        sums_MT, source_JT, values_N, route.source, route.targets, route.starts,
        num_tokens, sums_MT.stride(1), sums_MT.stride(0), source_JT.stride(1), source_JT.stride(0),
        BLOCK_T=BLOCK_T, WIDE=_wide(source_TJ),
    )  # fmt: skip
    target_TM.add_(sums_MT.t())


@on_its_gpu
def value_gradient_(total_N: Tensor, dy_TO: Tensor, x_TI: Tensor, rows: Tensor, cols: Tensor) -> None:
    """`total[e] += sum over tokens of dy[:, rows[e]] * x[:, cols[e]]`, in place; total in float32.

    The tokens are split over programs, so that a few entries fill a GPU, and their sums are added in order.

    Args:
        total_N: one for each entry.
        dy_TO: any strides; fastest where the tokens are contiguous.
        x_TI: any strides.
        rows: (N,) columns of dy.
        cols: (N,) columns of x.
    """
    num_tokens = x_TI.shape[0]
    parts = total_N.new_empty(triton.cdiv(num_tokens, BLOCK_T_WIDE), rows.numel())
    _value_gradient[(rows.numel(), parts.shape[0])](
        parts, dy_TO, x_TI, rows, cols,
        num_tokens, rows.numel(), dy_TO.stride(0), dy_TO.stride(1), x_TI.stride(0), x_TI.stride(1),
        BLOCK_T=BLOCK_T_WIDE, WIDE=_wide(x_TI),
    )  # fmt: skip
    total_N.add_(parts.sum(0))


def _wide(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _accumulate(
    target, source, values, columns, targets, starts,
    num_tokens, target_t, target_m, source_t, source_j,
    BLOCK_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = tokens < num_tokens
    total = tl.zeros((BLOCK_T,), dtype=WIDE)
    for entry in range(tl.load(starts + unit), tl.load(starts + unit + 1)):
        column = tl.load(columns + entry).to(tl.int64)
        part = tl.load(source + tokens * source_t + column * source_j, mask=here, other=0.0)
        total += part.to(WIDE) * tl.load(values + entry).to(WIDE)
    at = target + tokens * target_t + tl.load(targets + unit).to(tl.int64) * target_m
    old = tl.load(at, mask=here, other=0.0).to(WIDE)
    tl.store(at, (old + total).to(target.dtype.element_ty), mask=here)


@triton.jit
def _value_gradient(
    parts, dy, x, rows, cols,
    num_tokens, num_entries, dy_t, dy_o, x_t, x_i,
    BLOCK_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    entry, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    column = tl.load(cols + entry).to(tl.int64)
    tokens = (part * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = tokens < num_tokens
    left = tl.load(dy + tokens * dy_t + row * dy_o, mask=here, other=0.0)
    right = tl.load(x + tokens * x_t + column * x_i, mask=here, other=0.0)
    tl.store(parts + part * num_entries + entry, tl.sum(left.to(WIDE) * right.to(WIDE), 0))
