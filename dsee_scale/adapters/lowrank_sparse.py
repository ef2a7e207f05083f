"""The whole update of a layer's output, s * ((x A^T) B^T + x S2^T), as one autograd function.

x is saved once for both parts, each weight's gradient is formed from it directly, and the sum is written
into the base layer's output where nobody else needs that. No O x I tensor is made.

Shapes: T tokens, O outputs, I inputs, R rank, K slices, S outputs covered by the slices, N entries of S2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsee_scale.adapters.sparse_residual import backward_, forward_
from dsee_scale.adapters.support import PreparedSupport
from dsee_scale.algorithms.delta import AdapterSpec


@dataclass(frozen=True, eq=False)
class Update:
    """What is fixed about one layer's update.

    Attributes:
        spec: the adapter's.
        support: the entries of S2, prepared for the products.
        in_place: whether the base output may be overwritten: its own backward does not need it.
    """

    spec: AdapterSpec
    support: PreparedSupport
    in_place: bool


def add_update(y: Tensor, x: Tensor, flat: Tensor, update: Update) -> Tensor:
    """The base output plus the update.

    Computed in autocast's dtype where autocast is on, else in the parameter's. First derivatives only.

    Args:
        y: (..., O) base output; overwritten if `update.in_place`, so use the result instead.
        x: (..., I) input of the update.
        flat: (K*R*I + S*R + N,), A, B and values one after the other.
        update: the rest.

    Returns:
        (..., O) in y's dtype.
    """
    return _LowRankSparse.apply(y, x, flat, update)


class _LowRankSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, flat: Tensor, update: Update) -> Tensor:
        spec, dtype = update.spec, compute_dtype(x, flat)
        a, b, values = spec.split(flat.to(dtype))
        x_TI = x.reshape(-1, a.shape[1]).to(dtype)
        # The scaling goes into z, the smallest factor of the forward product and of B's gradient.
        z_TKR = (x_TI @ a.t()).mul_(spec.scaling)
        out = _own(y, update.in_place)
        out_TO = out.view(-1, y.shape[-1])
        for start, stop, of_a, of_b in spec.per_slice():
            _addmm_(out_TO[:, start:stop], z_TKR[:, of_a], b[of_b].t())
        if spec.num_sparse:
            forward_(out_TO, x_TI, values * spec.scaling, update.support)
        ctx.save_for_backward(x_TI, z_TKR, flat)
        ctx.update, ctx.x_shape, ctx.x_dtype = update, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, z_TKR, flat = ctx.saved_tensors
        update, spec, dtype = ctx.update, ctx.update.spec, x_TI.dtype
        need_y, need_x, need_flat, _ = ctx.needs_input_grad
        a, b, values = spec.split(flat.to(dtype))
        dy_TO = dy.reshape(-1, dy.shape[-1]).to(dtype)
        dz_TKR = _dz(dy_TO, b, spec)
        # Not made as (T, I) and viewed: into a tensor that is no view autograd adds the base's gradient.
        dx = dz_TKR.view(*ctx.x_shape[:-1], dz_TKR.shape[-1]) @ a if need_x else None
        dx_TI = None if dx is None else dx.view(x_TI.shape)
        dvalues = None
        if spec.num_sparse:
            dvalues = backward_(dx_TI, dy_TO, x_TI, values * spec.scaling, update.support, need_flat)
        dflat = None
        if need_flat:
            last = values if dvalues is None else dvalues.mul_(spec.scaling).to(dtype)
            parts = [dz_TKR.t() @ x_TI, *_db(dy_TO, z_TKR, spec), last]
            dflat = torch.cat([part.reshape(-1) for part in parts]).to(flat.dtype)
        dx = None if dx is None else dx.to(ctx.x_dtype)
        return dy if need_y else None, dx, dflat, None


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


def _addmm_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right; out may have another dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _dz(dy_TO: Tensor, b: Tensor, spec: AdapterSpec) -> Tensor:
    """Gradient of x A^T, (T, K*R)."""
    parts = [dy_TO[:, start:stop] @ b[of_b] for start, stop, _, of_b in spec.per_slice()]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).mul_(spec.scaling)


def _db(dy_TO: Tensor, z_TKR: Tensor, spec: AdapterSpec) -> list[Tensor]:
    """Gradient of B's rows, slice by slice."""
    return [dy_TO[:, start:stop].t() @ z_TKR[:, of_a] for start, stop, of_a, _ in spec.per_slice()]
