"""A layer's output with its update, x W^T + bias + s ((x A^T) B^T + x S2^T), as one autograd function.

x is saved once for everything, the gradient of x is summed in place, and each weight's gradient is formed from x
directly. No O x I tensor is made. Where the base layer must compute its output itself (it is quantised, or has a
forward of its own), the update is added to that.

Shapes: T tokens, O outputs, I inputs, R rank, K slices, S outputs covered by the slices, N entries of S2, P columns of
a slice's factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsee_scale.adapters.kernels.factors import Factors, Fold, flat_gradient, folds, low_ranks, make_factors
from dsee_scale.adapters.kernels.sparse_residual import backward_, forward_
from dsee_scale.adapters.support import PreparedSupport
from dsee_scale.algorithms.delta import AdapterSpec


@dataclass(frozen=True, eq=False)
class Update:
    """What is fixed about one layer's update.

    Attributes:
        spec: the adapter's.
        support: the entries of S2, prepared for the products.
        fold: where they stand in the factors, where there are few.
        in_place: whether the base output may be overwritten: its own backward does not need it.
    """

    spec: AdapterSpec
    support: PreparedSupport
    fold: Fold | None
    in_place: bool

    def fold_for(self, x: Tensor) -> Fold | None:
        """The fold, where it pays for a product with x."""
        return self.fold if folds(x.dtype, x.device) else None


def add_update(y: Tensor, x: Tensor, flat: Tensor, update: Update) -> Tensor:
    """The base output plus the update.

    Computed in autocast's dtype where autocast is on, else in the parameter's. First derivatives only.

    Args:
        y: (..., O) base output; overwritten if `update.in_place`, so use the result instead.
        x: (..., I) input of the update.
        flat: (K*R*I + S*R + K*N,), A, B and values one after the other.
        update: the rest.

    Returns:
        (..., O) in y's dtype.
    """
    return _AddUpdate.apply(y, x, flat, update)


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, flat: Tensor, update: Update) -> Tensor:
    """x W^T + bias plus the update, where nn.Linear or Conv1D compute the former. No gradient for W.

    Args:
        x: (..., I), in the dtype of weight and flat unless autocast is on.
        weight: W as it is stored, frozen.
        bias: (O,) or None.
        flat: as for `add_update`.
        update: the rest.

    Returns:
        (..., O).
    """
    return _AdaptedLinear.apply(x, weight, bias, flat, update)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, flat: Tensor, update: Update
    ) -> Tensor:
        dtype = compute_dtype(x, weight)
        x_cast = x.to(dtype)
        y = _base_output(x_cast, weight, bias, update.spec.transposed)
        y_TO, x_TI = y.view(-1, y.shape[-1]), x_cast.reshape(-1, x.shape[-1])
        fold = update.fold_for(x_TI)
        factors = make_factors(flat, update.spec, fold, dtype)
        z_TKP = _add_product_(y_TO, x_TI, factors, update)
        ctx.save_for_backward(x_cast, z_TKP, weight, flat, *_kept(factors, fold))
        ctx.update, ctx.x_dtype, ctx.bias_dtype = update, x.dtype, None if bias is None else bias.dtype
        return y if torch.compiler.is_compiling() else y.data  # of a view autograd forbids in-place changes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z_TKP, weight, flat, *kept = ctx.saved_tensors
        need_x, _, need_bias, need_flat, _ = ctx.needs_input_grad
        dy = dy.to(x.dtype)
        dx = None
        if need_x:
            weight = weight.to(x.dtype)
            dx = dy @ (weight.t() if ctx.update.spec.transposed else weight)
        dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx_TI = None if dx is None else dx.view(x_TI.shape)
        dflat = _add_gradients_(dx_TI, dy_TO, x_TI, z_TKP, flat, kept, ctx.update, need_flat)
        dbias = dy_TO.sum(0).to(ctx.bias_dtype) if need_bias else None
        return None if dx is None else dx.to(ctx.x_dtype), None, dbias, dflat, None


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, flat: Tensor, update: Update) -> Tensor:
        dtype = compute_dtype(x, flat)
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        out = _own(y, update.in_place)
        fold = update.fold_for(x_TI)
        factors = make_factors(flat, update.spec, fold, dtype)
        z_TKP = _add_product_(out.view(-1, y.shape[-1]), x_TI, factors, update)
        ctx.save_for_backward(x_TI, z_TKP, flat, *_kept(factors, fold))
        ctx.update, ctx.x_shape, ctx.x_dtype = update, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, z_TKP, flat, *kept = ctx.saved_tensors
        need_y, need_x, need_flat, _ = ctx.needs_input_grad
        dy_TO = dy.reshape(-1, dy.shape[-1]).to(x_TI.dtype)
        dx = torch.zeros(ctx.x_shape, dtype=x_TI.dtype, device=x_TI.device) if need_x else None
        dx_TI = None if dx is None else dx.view(x_TI.shape)
        dflat = _add_gradients_(dx_TI, dy_TO, x_TI, z_TKP, flat, kept, ctx.update, need_flat)
        return dy if need_y else None, None if dx is None else dx.to(ctx.x_dtype), dflat, None


def _base_output(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """As the base layer computes it, to the bit."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if transposed and bias is not None:
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)


def _kept(factors: Factors, fold: Fold | None) -> tuple[Tensor, ...]:
    """What backward need not make again; nothing that is a view of the parameter, which ZeRO-3 frees meanwhile."""
    return () if fold is None else (factors.left, factors.right)


def _add_product_(y_TO: Tensor, x_TI: Tensor, factors: Factors, update: Update) -> Tensor:
    """y += x D^T in place; returns x left^T, (T, K*P)."""
    z_TKP = x_TI @ factors.left.t()
    for start, stop, of_left, of_right in factors.spec.per_slice():
        _addmm_(
            _part(y_TO, 1, start, stop),
            _part(z_TKP, 1, of_left.start, of_left.stop),
            _part(factors.right, 0, of_right.start, of_right.stop).t(),
            update.spec.scaling,
        )
    if factors.values is not None:
        forward_(y_TO, x_TI, factors.values, update.support)
    return z_TKP


def _add_gradients_(
    dx_TI: Tensor | None,
    dy_TO: Tensor,
    x_TI: Tensor,
    z_TKP: Tensor,
    flat: Tensor,
    kept: Sequence[Tensor],
    update: Update,
    need_flat: bool,
) -> Tensor | None:
    """dx += dy D in place; returns the gradient of `flat` if it is wanted."""
    spec, fold = update.spec, update.fold_for(x_TI)
    if kept and fold is not None:
        factors = Factors(fold.spec, kept[0], kept[1], None)
    else:
        factors = make_factors(flat, spec, fold, x_TI.dtype)
    slices = [
        (
            _part(dy_TO, 1, start, stop),
            _part(z_TKP, 1, of_left.start, of_left.stop),
            _part(factors.right, 0, of_right.start, of_right.stop),
        )
        for start, stop, of_left, of_right in factors.spec.per_slice()
    ]
    dz_TKP = _joined([dy @ right for dy, _, right in slices], 1)
    if dx_TI is not None:
        dx_TI.addmm_(dz_TKP, factors.left, alpha=spec.scaling)
    dvalues = None
    if factors.values is not None:
        dvalues = backward_(dx_TI, dy_TO, x_TI, factors.values, update.support, need_flat)
    if not need_flat:
        return None
    # Not dy^T z: a CPU is faster where it reads the wide side by rows.
    dright = _joined([(z.t() @ dy).t() for dy, z, _ in slices], 0)
    return flat_gradient(flat, spec, fold, low_ranks(dz_TKP, spec).t() @ x_TI, dright, dvalues)


def _part(matrix: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Some columns or rows; all of them cost no operator."""
    size = stop - start
    return matrix if size == matrix.shape[dim] else matrix.narrow(dim, start, size)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def compute_dtype(x: Tensor, own: Tensor) -> torch.dtype:
    """Autocast's where it is on, else that of the layer's own tensor."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return own.dtype


def _own(y: Tensor, in_place: bool) -> Tensor:
    """A tensor with y's contents that may be written to: y's own memory, or a copy.

    `.data` rather than `mark_dirty`: y may be a view (Conv1D's output is), and for a view autograd would copy
    the whole gradient in backward. In exchange y's version is raised by hand, so that a base layer that does
    need its output in backward raises PyTorch's usual error instead of using the overwritten values.
    """
    if not in_place or torch.compiler.is_compiling() or not y.is_contiguous():
        return y.clone(memory_format=torch.contiguous_format)
    if y.requires_grad:
        torch.autograd.graph.increment_version(y)
    return y.data


def _addmm_(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out += scaling * left @ right; out may have another dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scaling)
    else:
        out.add_(left @ right, alpha=scaling)
