"""Tokens times their experts' matrices, W and D together: one product over all experts, none of them in a loop.

    y_t = x_t (W_e + s (B_e A_e + S2_e))^T       of a token t that was routed to expert e
    y_t = x_t ((W_e + s (B_e A_e + S2_e)) * M_e)^T       after pruning, M = (W != 0)

The experts' matrices lie one after the other in one parameter, and so do their updates: the adapter's spec has a
slice for each expert. In the first form the update is two thin grouped products (`factors`), and no matrix of W's size
is made. In the second, and where S2 has so many entries that the thin products would not be thin, W + D is formed for
the product and formed again in backward, so that none is kept between layers.

Shapes: S routed tokens in their experts' order, E experts, O outputs, I inputs, R rank, P columns of an expert's
factors; M and J are the rows and columns of a matrix as it is stored, O and I, or I and O where it is transposed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsee_scale.adapters.kernels.factors import Factors, Fold, flat_gradient, make_factors
from dsee_scale.algorithms.bits import zero_where_zero_
from dsee_scale.algorithms.delta import AdapterSpec, Delta, Form, merged_weight

ALIGNED = 16
"""Bytes that every stride of what goes into PyTorch's grouped product must be a multiple of."""


@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """What is fixed about the update of one parameter of experts.

    Attributes:
        spec: the adapter's, of the parameter seen as one matrix (E*M, J), with a slice of M rows for each expert. Where
            an expert's matrix is stored I x O, its B belongs to the inputs and its A to the outputs.
        rows: int32 (E*N,) row of each entry of S2 in that matrix.
        cols: int32 (E*N,) its column.
        transposed: whether an expert's matrix is stored I x O.
        fold: where S2's entries stand in the factors; None where W + D is formed, or S2 is empty.
    """

    spec: AdapterSpec
    rows: Tensor
    cols: Tensor
    transposed: bool
    fold: Fold | None

    @functools.cached_property
    def host_rows(self) -> Tensor:
        """int64 (E*N,), the rows on the CPU: fetched once, not at every step."""
        return self.rows.cpu().long()

    @property
    def thin(self) -> bool:
        """Whether the update can be two thin products."""
        return self.fold is not None or not self.spec.num_sparse

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, M, J)."""
        return len(self.spec.slices), self.spec.shape[0] // len(self.spec.slices), self.spec.shape[1]


def expert_product(
    x_SI: Tensor, weight: Tensor, flat: Tensor, ends_E: Tensor, update: ExpertUpdate, *, masked: bool
) -> Tensor:
    """Tokens times their experts' matrices with the update. First derivatives only; none for W, which is frozen.

    Args:
        x_SI: the routed tokens, in the order of their experts.
        weight: W as it is stored, (E, M, J); computed in its dtype.
        flat: A, B and values one after the other.
        ends_E: int32, where each expert's tokens end.
        update: the rest.
        masked: whether W's zeros are a mask on W + D.

    Returns:
        (S, O) in W's dtype.
    """
    form = _MergedProduct if masked or not update.thin else _ThinProduct
    return form.apply(x_SI.to(weight.dtype), weight, flat, ends_E, update, masked)


class _ThinProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, flat: Tensor, ends: Tensor, update: ExpertUpdate, masked: bool
    ) -> Tensor:
        first, second = _thin(make_factors(flat, update.spec, update.fold, x.dtype), update)
        z_SP = grouped_mm(x, first, ends)
        y = grouped_mm(x, _inputs_first(weight, update), ends).add_(
            grouped_mm(z_SP, second, ends), alpha=update.spec.scaling
        )
        ctx.save_for_backward(x, z_SP, weight, flat, ends)
        ctx.update = update
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z_SP, weight, flat, ends = ctx.saved_tensors
        update: ExpertUpdate = ctx.update
        need_x, _, need_flat, *_ = ctx.needs_input_grad
        first, second = _thin(make_factors(flat, update.spec, update.fold, x.dtype), update)
        dz_SP = grouped_mm(dy, second.transpose(1, 2), ends)
        dx = dflat = None
        if need_x:
            dx = grouped_mm(dy, _inputs_first(weight, update).transpose(1, 2), ends)
            dx.add_(grouped_mm(dz_SP, first.transpose(1, 2), ends), alpha=update.spec.scaling)
        if need_flat:
            by_a, of_a, of_b, by_b = (z_SP, dy, x, dz_SP) if update.transposed else (dz_SP, x, dy, z_SP)
            da = grouped_outer(by_a[:, : update.spec.rank], of_a, ends).flatten(0, 1)
            dright = grouped_outer(of_b, by_b, ends).flatten(0, 1)
            dflat = flat_gradient(flat, update.spec, update.fold, da, dright, None)
        return dx, None, dflat, None, None, None


class _MergedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, flat: Tensor, ends: Tensor, update: ExpertUpdate, masked: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, flat, ends)
        ctx.update, ctx.masked = update, masked
        return grouped_mm(x, _inputs_first(_merged(weight, flat, update, masked), update), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, flat, ends = ctx.saved_tensors
        update: ExpertUpdate = ctx.update
        need_x, _, need_flat, *_ = ctx.needs_input_grad
        dx = dflat = None
        if need_x:
            merged = _inputs_first(_merged(weight, flat, update, ctx.masked), update)
            dx = grouped_mm(dy, merged.transpose(1, 2), ends)
            del merged  # its memory serves the gradient of D
        if need_flat:
            left, right = (x, dy) if update.transposed else (dy, x)
            gradient = grouped_outer(left, right, ends)
            if ctx.masked:
                zero_where_zero_(gradient, weight)
            dflat = _flat_gradient(gradient, flat, update)
        return dx, None, dflat, None, None, None


def _thin(factors: Factors, update: ExpertUpdate) -> tuple[Tensor, Tensor]:
    """(E, I, P) and (E, P, O), whose product is the update's but for the scaling, inputs first."""
    num_experts, _, columns = update.shape
    left_EPJ = factors.left.view(-1, factors.spec.rank, columns).expand(num_experts, -1, -1)
    right_EMP = factors.right.view(num_experts, -1, factors.spec.rank)
    return (
        (right_EMP, left_EPJ) if update.transposed else (left_EPJ.transpose(1, 2), right_EMP.transpose(1, 2))
    )


def _inputs_first(stored_EMJ: Tensor, update: ExpertUpdate) -> Tensor:
    """(E, I, O), a view."""
    return stored_EMJ if update.transposed else stored_EMJ.transpose(1, 2)


def _merged(weight: Tensor, flat: Tensor, update: ExpertUpdate, masked: bool) -> Tensor:
    """W + D, under W's mask or not, (E, M, J), rounded once."""
    delta = Delta.of(update.spec, flat, update.rows, update.cols, update.host_rows)
    form: Form = "masked" if masked else "dense"
    return merged_weight(weight, delta, pruned=masked, form=form, out=torch.empty_like(weight))


def _flat_gradient(gradient_EMJ: Tensor, flat: Tensor, update: ExpertUpdate) -> Tensor:
    """Gradients of A, B and the values in one tensor, from that of D."""
    spec, (num_experts, _, columns) = update.spec, update.shape
    a, b, _ = spec.split(flat.to(gradient_EMJ.dtype))
    a_ERJ = a.view(-1, spec.rank, columns).expand(num_experts, -1, -1)
    b_EMR = b.view(num_experts, -1, spec.rank)
    da, db, dvalues = spec.split(grad := torch.empty_like(flat))
    db.copy_((gradient_EMJ @ a_ERJ.transpose(1, 2)).view(db.shape))
    da_ERJ = b_EMR.transpose(1, 2) @ gradient_EMJ
    da.copy_(da_ERJ.sum(0) if spec.shared_a else da_ERJ.view(da.shape))
    dvalues.copy_(gradient_EMJ.flatten(0, 1)[update.rows.long(), update.cols.long()])
    return grad.mul_(spec.scaling)


def grouped_mm(x_SI: Tensor, matrices_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each token times its expert's matrix, (S, O).

    Args:
        x_SI: tokens in the order of their experts.
        matrices_EIO: of any strides, in x's dtype.
        ends_E: int32, where each expert's tokens end.
    """
    product = _native(x_SI, matrices_EIO)
    if product is not None:
        return product(x_SI, matrices_EIO, offs=ends_E)
    place = _places(x_SI, ends_E)
    padded = x_SI.new_zeros(len(ends_E) * place.longest, x_SI.shape[1]).index_copy_(0, place.at, x_SI)
    return (padded.view(len(ends_E), place.longest, -1) @ matrices_EIO).flatten(0, 1)[place.at]


def grouped_outer(left_SM: Tensor, right_SJ: Tensor, ends_E: Tensor) -> Tensor:
    """left^T right over each expert's tokens, (E, M, J); zero for an expert without any."""
    product = _native(left_SM, right_SJ)
    if product is not None:
        return product(left_SM.t(), right_SJ, offs=ends_E)
    place = _places(left_SM, ends_E)
    size = (len(ends_E), place.longest, -1)
    left, right = (
        side.new_zeros(size[0] * size[1], side.shape[1]).index_copy_(0, place.at, side).view(size)
        for side in (left_SM, right_SJ)
    )
    return left.transpose(1, 2) @ right


@dataclass(frozen=True, eq=False)
class _Places:
    """Where tokens go in a table that has as many rows for every expert as the busiest one needs."""

    at: Tensor
    longest: int


def _places(x_SI: Tensor, ends_E: Tensor) -> _Places:
    tokens = torch.arange(len(x_SI), device=x_SI.device)
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    longest = max(1, int(counts.max()))
    expert = torch.searchsorted(ends_E.long(), tokens, right=True)
    return _Places(expert * longest + tokens - (ends_E.long() - counts)[expert], longest)


def _native(*operands: Tensor) -> Any:
    """PyTorch's own grouped product, where there is one that takes these."""
    product = getattr(torch.nn.functional, "grouped_mm", None)
    if product is None or any(not _fits(each) for each in operands):
        return None
    device = operands[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return product


def _fits(each: Tensor) -> bool:
    known = each.dtype in (torch.float32, torch.bfloat16, torch.float16)
    strides = sorted(each.stride()[-2:])
    plain = strides[0] == 1 and strides[1] * each.element_size() % ALIGNED == 0
    return known and plain and each.data_ptr() % ALIGNED == 0
