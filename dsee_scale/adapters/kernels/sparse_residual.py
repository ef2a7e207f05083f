"""The sparse residual: y += x S2^T, its input gradient and its value gradient, with S2 never made dense.

All three are sums over S2's entries, along the routes that `support` prepares. Every sum runs in a fixed order,
without atomics: the same bits on every run.

Shapes: T tokens, O outputs, I inputs, N entries of S2 (over all slices), U distinct targets; M and J are
the target's and the source's side, O and I or the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from dsee_scale.adapters.support import PreparedSupport, Route

BLOCK_TOKENS = {"cpu": 128, "cuda": 4096}
"""Tokens that `bags` transposes at once: few enough that a block stays in a core's cache."""
GATHER_ELEMENTS = 2**20
"""Elements that `gather` holds at once in each of its temporaries."""


def forward_(y_TO: Tensor, x_TI: Tensor, values_N: Tensor, support: PreparedSupport) -> None:
    """y += x S2^T in place; the values in the dtype of x."""
    for start, stop in _blocks(x_TI.shape[0], support):
        y, x = y_TO[start:stop], x_TI[start:stop]
        if support.method == "gather":
            _add_columns_(y, _columns(x, support.forward.source).mul_(values_N), support.forward)
        elif support.method == "bags":
            _add_bags_(y, x.t().contiguous(), values_N, support.forward)
        else:
            _triton().accumulate_(y, x, values_N, support.forward, support.transposed)


def backward_(
    dx_TI: Tensor | None,
    dy_TO: Tensor,
    x_TI: Tensor,
    values_N: Tensor,
    support: PreparedSupport,
    want_values: bool = True,
) -> Tensor | None:
    """dx += dy S2 in place, and the gradient of the values: the sum over tokens of dy[t, row] * x[t, col].

    Args:
        dx_TI: added to; None where x needs no gradient.
        dy_TO: gradient of y.
        x_TI: what the forward product read.
        values_N: in the dtype of x.
        support: the entries.
        want_values: whether the gradient of the values is wanted.

    Returns:
        (N,) in float32 or wider, or None.
    """
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    total = torch.zeros(support.rows.shape, dtype=dtype, device=x_TI.device) if want_values else None
    run = {"gather": _backward_gather, "bags": _backward_bags, "triton": _backward_triton}[support.method]
    for start, stop in _blocks(x_TI.shape[0], support):
        dx = None if dx_TI is None else dx_TI[start:stop]
        run(dx, total, dy_TO[start:stop], x_TI[start:stop], values_N, support)
    return total


def _backward_gather(
    dx: Tensor | None, total: Tensor | None, dy: Tensor, x: Tensor, values_N: Tensor, support: PreparedSupport
) -> None:
    at_rows = _columns(dy, support.backward.source)
    if total is not None:
        total += (_columns(x, support.forward.source).mul_(at_rows)).sum(0, dtype=total.dtype)
    if dx is not None:
        _add_columns_(dx, at_rows.mul_(values_N), support.backward)


def _backward_bags(
    dx: Tensor | None, total: Tensor | None, dy: Tensor, x: Tensor, values_N: Tensor, support: PreparedSupport
) -> None:
    dy_OT = dy.t().contiguous()
    if total is not None:
        route = support.forward
        assert route.starts is not None
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy_OT, x.t().contiguous(), route.source, route.starts[:-1], support.rows, 0
        )
    if dx is not None:
        _add_bags_(dx, dy_OT, values_N, support.backward)


def _backward_triton(
    dx: Tensor | None, total: Tensor | None, dy: Tensor, x: Tensor, values_N: Tensor, support: PreparedSupport
) -> None:
    if not dy.shape[0]:
        return
    if support.transposed:  # once for both sums; what is transposed already costs nothing to transpose again
        dy = dy.t().contiguous().t()
    if total is not None:
        x = x.t().contiguous().t() if support.transposed else x
        _triton().value_gradient_(total, dy, x, support.rows, support.cols)
    if dx is not None:
        _triton().accumulate_(dx, dy, values_N, support.backward, support.transposed)


def _blocks(num_tokens: int, support: PreparedSupport) -> Iterator[tuple[int, int]]:
    """Token ranges small enough for the method's temporaries; none for no tokens. Traced as one."""
    step = max(1, num_tokens)
    if support.method == "gather":
        step = max(1, GATHER_ELEMENTS // support.rows.numel())
    elif support.transposed:
        step = BLOCK_TOKENS[support.rows.device.type]
    if torch.compiler.is_compiling():
        yield 0, num_tokens
        return
    for start in range(0, num_tokens, step):
        yield start, min(start + step, num_tokens)


def _columns(matrix_TJ: Tensor, index_N: Tensor) -> Tensor:
    """(T, N) columns of a matrix; on CPU gather is the fastest of PyTorch's several ways to say so."""
    return matrix_TJ.gather(1, index_N.expand(matrix_TJ.shape[0], -1))


def _add_columns_(target_TM: Tensor, part_TN: Tensor, route: Route) -> None:
    """Add one column per entry; part is overwritten."""
    if route.group is not None:
        wide = torch.promote_types(part_TN.dtype, torch.float32)
        sums = torch.zeros(part_TN.shape[0], route.targets.numel(), dtype=wide, device=part_TN.device)
        part_TN = sums.index_add_(1, route.group, part_TN.to(wide))
    if target_TM.dtype in (torch.float32, torch.float64):
        target_TM.index_add_(1, route.targets, part_TN.to(target_TM.dtype))
        return
    # In half precision PyTorch's index_add_ converts the whole target to float32 and back.
    target_TM.index_copy_(1, route.targets, _columns(target_TM, route.targets).add_(part_TN))


def _add_bags_(target_TM: Tensor, source_JT: Tensor, values_N: Tensor, route: Route) -> None:
    """Add the product as one bag of source rows per target, each a contiguous sum over tokens."""
    assert route.starts is not None
    values_N = values_N if route.order is None else values_N.index_select(0, route.order)
    bags = torch.embedding_bag(source_JT, route.source, route.starts, False, 0, False, values_N, True)
    target_TM.add_(bags[0].t().contiguous())


def _triton() -> ModuleType:
    from dsee_scale.adapters.kernels import triton_kernels

    return triton_kernels
