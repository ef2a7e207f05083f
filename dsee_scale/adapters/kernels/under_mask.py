"""An adapted layer after its weight was pruned, trained as its masked export will be:

    y = x ((W + s (B A + S2)) * M)^T + bias,    M = (W != 0)

The masked weight is formed for the product and formed again in backward, so no O x I tensor is kept between
layers, and no mask: W's own zeros are it, and ZeRO-3 has W whole on both occasions. The gradient of D is
(dy^T x) * M; those of A, B and the values are taken from it. Extra memory while a layer runs: one weight.

Shapes: T tokens, O outputs, I inputs, R rank, N entries of S2, W the slice's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsee_scale.adapters.kernels.lowrank_sparse import compute_dtype
from dsee_scale.algorithms.bits import zero_where_zero_
from dsee_scale.algorithms.current_gpu import has_triton
from dsee_scale.algorithms.delta import AdapterSpec, Delta, merged_weight
from dsee_scale.partition.quantized import Codec


@dataclass(frozen=True, eq=False)
class MaskedLayer:
    """What is fixed about one layer's product.

    Attributes:
        spec: the adapter's.
        rows: int32 (N,) output index of each entry of S2.
        cols: int32 (N,) input index.
        codec: how the weight is stored if it is quantised.
        form: `masked` for the whole product, `update` for D * M alone.
    """

    spec: AdapterSpec
    rows: Tensor
    cols: Tensor
    codec: Codec | None
    form: Literal["masked", "update"]


def masked_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, flat: Tensor, layer: MaskedLayer
) -> Tensor:
    """x ((W + D) * M)^T + bias, or x (D * M)^T. First derivatives only; none for W, which is frozen.

    Computed in autocast's dtype where autocast is on, else in the weight's, or the adapter's where the weight is
    quantised.

    Args:
        x: (..., I).
        weight: W as it is stored; its zeros are the mask.
        bias: (O,) or None.
        flat: A, B and the values one after the other.
        layer: the rest.

    Returns:
        (..., O), in the dtype that it is computed in; in x's for a quantised weight.
    """
    return _MaskedProduct.apply(x, weight, bias, flat, layer)


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, flat: Tensor, layer: MaskedLayer
    ) -> Tensor:
        dtype = compute_dtype(x, weight if layer.codec is None else flat)
        merged_OI = _merged(weight, flat, layer, dtype)[0]
        x_cast = x.to(dtype)
        y = torch.nn.functional.linear(x_cast, merged_OI, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(x_cast, weight, flat)
        ctx.layer, ctx.x_dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        return y if layer.codec is None else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, flat = ctx.saved_tensors
        need_x, _, need_bias, need_flat, _ = ctx.needs_input_grad
        dy = dy.to(x.dtype)
        dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dflat = None
        if need_x:
            merged_OI, decoded = _merged(weight, flat, ctx.layer, x.dtype)
            dx = (dy @ merged_OI).to(ctx.x_dtype)
            del merged_OI  # its memory serves the gradient of D
        else:
            decoded = _decoded(weight, ctx.layer)
        if need_flat:
            dflat = _flat_gradient(dy_TO, x_TI, decoded, flat, ctx.layer)
        dbias = dy_TO.sum(0).to(ctx.bias_dtype) if need_bias else None
        return dx, None, dbias, dflat, None


def _decoded(weight: Tensor, layer: MaskedLayer) -> Tensor:
    """W as floating-point entries, in its storage layout."""
    if layer.codec is None:
        return weight
    return layer.codec.decode(weight)[0].view(layer.spec.storage_shape)


def _fused(weight: Tensor, flat: Tensor) -> bool:
    """Whether one kernel forms the merged weight: on a GPU with Triton, not in float64."""
    if torch.compiler.is_compiling() or torch.float64 in (weight.dtype, flat.dtype):
        return False
    return weight.device.type == "cuda" and has_triton()


def _merged(weight: Tensor, flat: Tensor, layer: MaskedLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(W + D) * M, or D * M, as (O, I), rounded once; and W's entries."""
    entries = _decoded(weight, layer)
    out = torch.empty(entries.shape, dtype=dtype, device=entries.device)
    if _fused(entries, flat):
        from dsee_scale.adapters.kernels.triton_merge import merge_under_mask_

        base = layer.form == "masked"
        merge_under_mask_(out, entries, flat, layer.rows, layer.cols, layer.spec, base=base)
    else:
        delta = Delta.of(layer.spec, flat, layer.rows, layer.cols)
        merged_weight(entries, delta, pruned=True, form=layer.form, out=out)
    return (out.t() if layer.spec.transposed else out), entries


def _flat_gradient(dy_TO: Tensor, x_TI: Tensor, weight: Tensor, flat: Tensor, layer: MaskedLayer) -> Tensor:
    """Gradients of A, B and the values in one tensor, from that of D slice by slice."""
    spec, dtype = layer.spec, x_TI.dtype
    a, b, _ = spec.split(flat.to(dtype))
    da, db, dvalues = spec.split(grad := torch.empty_like(flat))
    first = 0
    for start, stop, of_a, of_b in spec.per_slice():
        grad_WI = _update_gradient(dy_TO[:, start:stop], x_TI, weight, start, spec.transposed)
        db[of_b] = grad_WI @ a[of_a].t()
        da[of_a] = b[of_b].t() @ grad_WI
        here = slice(first, first + spec.num_sparse)
        dvalues[here] = grad_WI[layer.rows[here].long() - start, layer.cols[here].long()]
        first += spec.num_sparse
    return grad.mul_(spec.scaling)


def _update_gradient(dy_TW: Tensor, x_TI: Tensor, weight: Tensor, start: int, transposed: bool) -> Tensor:
    """(dy^T x) * M of one slice, (W, I), laid out as the weight is."""
    stop = start + dy_TW.shape[1]
    if transposed:
        return zero_where_zero_(x_TI.t() @ dy_TW, weight[:, start:stop]).t()
    return zero_where_zero_(dy_TW.t() @ x_TI, weight[start:stop])
