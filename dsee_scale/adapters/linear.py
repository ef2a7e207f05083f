"""The adapted layer: the base layer itself, given a subclass in place, whose forward adds the delta.

    y = base(x) + s * ((x A^T) B^T + x S2^T)

Nothing is nested: the base weight keeps its name, `isinstance` keeps its answer, and ZeRO-3 fetches the
layer's tensors together, through one set of hooks. A, B and the values of S2 lie one after the other in one
parameter: under ZeRO-3 every trained parameter costs a gradient hook, a copy into the reduction's bucket and,
after each optimizer step, an all-gather, however small it is.

Shapes: O outputs, I inputs, R rank, N sparse entries, K slices, S outputs covered by the slices.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsee_scale.adapters.kernels.factors import make_fold
from dsee_scale.adapters.kernels.lowrank_sparse import Update, adapted_linear, add_update
from dsee_scale.adapters.kernels.under_mask import MaskedLayer, masked_product
from dsee_scale.adapters.state import MASK_UPDATE, model_state, warn_of_new_zeros
from dsee_scale.adapters.support import check_support, prepare
from dsee_scale.algorithms.delta import AdapterSpec, Delta
from dsee_scale.errors import TargetError
from dsee_scale.partition.quantized import find_codecs

PARAMETER = "dsee_flat"
BUFFERS = ("dsee_rows", "dsee_cols")
ATTRIBUTES = ("dsee_spec", "dsee_under_mask", "dsee_update")
A_STD = 0.02
"""Standard deviation of A's normal init. B is zero, so it sets only how fast B starts to move."""
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Adapted(nn.Module):
    """What every adapted module is, a linear layer or the experts of a layer."""

    def dsee_weights(self, name: str) -> dict[str, Any]:
        """Its adapted weights by name, given its own; each has `weight`, `dsee_flat`, `dsee_spec` and the like."""
        raise NotImplementedError


class FlatViews:
    """A, B and the values of an adapter as views of `dsee_flat`, in the shapes that `dsee_spec` gives."""

    dsee_spec: AdapterSpec
    dsee_flat: nn.Parameter

    @property
    def dsee_A(self) -> Tensor:
        """(K*R, I); of experts (E*R, J), or (R, J) where they share it."""
        return self.dsee_spec.split(self.dsee_flat)[0]

    @property
    def dsee_B(self) -> Tensor:
        """(S, R); of experts (E*M, R)."""
        return self.dsee_spec.split(self.dsee_flat)[1]

    @property
    def dsee_values(self) -> Tensor:
        """(K*N,); of experts (E*N,)."""
        return self.dsee_spec.split(self.dsee_flat)[2]


class AdaptedLayer(FlatViews, Adapted):
    """Mixin in front of the base class of an adapted layer; `attach` makes instances, never a constructor.

    Attributes:
        dsee_flat: parameter (K*R*I + S*R + K*N,): A, B and values, as `AdapterSpec.split` has them.
        dsee_A: (K*R, I), view of it; only where the parameter is whole.
        dsee_B: (S, R), view of it, the slices' rows one after the other.
        dsee_values: (K*N,), view of it, the entries of S2.
        dsee_rows: int32 buffer (K*N,), each entry's output index in the whole weight.
        dsee_cols: int32 buffer (K*N,), each entry's input index; entries are sorted by (slice, row, col).
        dsee_spec: shape, slices, rank and the like.
        dsee_under_mask: whether the weight's zeros mask the update too, see `train_under_mask`.
        dsee_disabled: whether the layer computes its base output alone, see `adapters_disabled`.
        dsee_base: the layer's own class.
        dsee_in_place: whether the update may be added into the base layer's output.
        dsee_plain: whether the base class computes x W^T + bias and nothing else.
        dsee_quantised: whether the weight is stored in codes of bitsandbytes.
        dsee_update: the above, prepared for the products; derived, in no state dict.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    dsee_base: type[nn.Module]
    dsee_disabled: bool = False
    dsee_flat: nn.Parameter
    dsee_rows: Tensor
    dsee_cols: Tensor
    dsee_spec: AdapterSpec
    dsee_under_mask: bool
    dsee_in_place: bool
    dsee_plain: bool
    dsee_quantised: bool
    dsee_update: Update

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus delta.

        Args:
            x: (..., I).

        Returns:
            (..., O), in the base output's dtype.
        """
        if self.dsee_disabled:
            return super().forward(x)
        drops = self.training and self.dsee_spec.dropout > 0
        if self.dsee_under_mask and not drops:
            return self._masked(x, self.bias, "masked")
        if not drops and not self.dsee_under_mask and self.dsee_plain:
            weight, flat = self.weight, self.dsee_flat  # once each: under ZeRO-3 it costs something
            if not weight.requires_grad and _computes_alike(x, weight, flat):
                return adapted_linear(x, weight, self.bias, flat, self._update())
        y = super().forward(x)
        if drops:
            x = nn.functional.dropout(x, self.dsee_spec.dropout)
        if self.dsee_under_mask:  # W sees all of x, D * M what dropout left of it
            return y + self._masked(x, None, "update")
        return add_update(y, x, self.dsee_flat, self._update())

    def _masked(self, x: Tensor, bias: Tensor | None, form: Literal["masked", "update"]) -> Tensor:
        weight = self.weight
        if weight.requires_grad:  # it would get no gradient, so that this raises
            train_under_mask(self, True)
        codec = find_codecs(self)[id(weight)] if self.dsee_quantised else None
        layer = MaskedLayer(self.dsee_spec, self.dsee_rows, self.dsee_cols, codec, form)
        return masked_product(x, weight, bias, self.dsee_flat, layer)

    def _update(self) -> Update:
        """What the product needs besides the parameters; made anew if the buffers were moved."""
        if not torch.compiler.is_compiling() and self.dsee_update.support.rows is not self.dsee_rows:
            self.dsee_prepare()
        return self.dsee_update

    def dsee_prepare(self) -> None:
        """Prepare for the support in the buffers. Call it after writing other positions to them."""
        if self.dsee_rows.is_meta:
            return
        support = prepare(self.dsee_rows, self.dsee_cols, self.dsee_spec.shape)
        fold = make_fold(self.dsee_spec, self.dsee_rows, self.dsee_cols)
        self.dsee_update = Update(self.dsee_spec, support, fold, self.dsee_in_place)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        if self.dsee_update.support.rows is not self.dsee_rows:
            self.dsee_prepare()
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        warn_of_new_zeros(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.dsee_prepare()

    def dsee_weights(self, name: str) -> dict[str, Any]:
        """The layer itself."""
        return {name: self}

    def extra_repr(self) -> str:
        """The base layer's line, then the adapter's."""
        spec = self.dsee_spec
        under = ", under mask" if self.dsee_under_mask else ""
        return f"{super().extra_repr()}, rank={spec.rank}, num_sparse={spec.num_sparse}, slices={spec.slices}{under}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle through the base class: the subclass is made at run time and has no import name."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank, (self.dsee_base,), *state)


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer class that adds a delta; the same one at every call."""
    if base not in _CLASSES:
        namespace = {
            "__module__": __name__,
            "dsee_base": base,
            "dsee_in_place": _keeps_no_output(base),
            "dsee_plain": _is_plain(base),
            "dsee_quantised": _is_quantised(base),
        }
        _CLASSES[base] = type(f"Adapted{base.__name__}", (AdaptedLayer, base), namespace)
    return _CLASSES[base]


def _keeps_no_output(base: type[nn.Module]) -> bool:
    """Whether the layer's backward is known not to need its output, so that it may be overwritten."""
    return _is_plain(base) or _is_quantised(base)


def _computes_alike(x: Tensor, weight: Tensor, flat: Tensor) -> bool:
    """Whether base and update are computed in one dtype, so that they can be computed together."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return autocast or x.dtype == weight.dtype == flat.dtype


def _is_plain(base: type[nn.Module]) -> bool:
    alike = ("Conv1D", "FalconLinear", "EsmFoldLinear")  # transformers', which compute it by other operators
    return base.forward is nn.Linear.forward or base.__name__ in alike


def computes_product(module: nn.Module) -> bool:
    """Whether a layer, adapted or not, computes x W^T + bias and nothing else, as far as can be told by its class."""
    base = module.dsee_base if isinstance(module, AdaptedLayer) else type(module)
    return not isinstance(module, nn.Linear) or _is_plain(base) or _is_quantised(base)


def _is_quantised(base: type[nn.Module]) -> bool:
    return base.__module__.startswith("bitsandbytes")


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def attach(
    module: nn.Module,
    spec: AdapterSpec,
    rows: Tensor,
    cols: Tensor,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Turn a linear layer into an adapted one, in place. Reads nothing of the weight, so any storage will do.

    The layer's output stays the same bit for bit until the adapter is trained, since B and the values of S2
    start at zero. (Only a -0.0 may become 0.0.) The base parameters are neither replaced nor frozen here.

    Args:
        module: an `nn.Linear`, a transformers `Conv1D`, or a layer that is called like them.
        spec: shape of the weight, slices, rank and the like.
        rows: (K*N,) output index of each entry of S2, in the whole weight.
        cols: (K*N,) input index of each entry; the entries sorted by (slice, row, col).
        generator: source of A, on any device; None takes PyTorch's global one.
        dtype: of A, B and values: what the layer computes in, which for a quantised weight is not its own.
        device: where they live.

    Raises:
        TargetError: the layer is adapted already, or slices and support do not fit the shape.
    """
    _check_attachable(module, spec, rows, cols)
    module.dsee_flat = nn.Parameter(initial_values(spec, generator).to(device=device, dtype=dtype))
    module.register_buffer("dsee_rows", rows.to(device=device, dtype=torch.int32, copy=True))
    module.register_buffer("dsee_cols", cols.to(device=device, dtype=torch.int32, copy=True))
    module.dsee_spec, module.dsee_under_mask = spec, False  # type: ignore[assignment]
    module.__class__ = adapted_class(type(module))
    module.dsee_prepare()  # type: ignore[operator]


def _check_attachable(module: nn.Module, spec: AdapterSpec, rows: Tensor, cols: Tensor) -> None:
    if is_adapted(module):
        raise TargetError(f"{type(module).__name__} is already adapted; detach it before adapting it again")
    reject_replaced_forward(f"this {type(module).__name__}", module)
    check_support(spec, rows, cols)


def reject_replaced_forward(name: str, module: nn.Module) -> None:
    """Raise TargetError for a module whose instance has a forward of its own, which its class's would not replace."""
    if "forward" in vars(module):
        raise TargetError(
            f"the forward of {name} was replaced on the instance, which would hide the adapter's (accelerate does so "
            "for a device_map over several devices); load it without that"
        )


def initial_values(spec: AdapterSpec, generator: torch.Generator | None) -> Tensor:
    """Random A, zero B and zero values in one float32 vector, on the generator's device."""
    device = generator.device if generator is not None else torch.device("cpu")
    flat = torch.zeros(spec.numel, device=device, dtype=torch.float32)
    flat[: math.prod(spec.shapes[0])].normal_(std=A_STD, generator=generator)
    return flat


def detach(module: nn.Module) -> None:
    """Give an adapted layer its own class back and drop what `attach` added.

    Raises:
        TargetError: the layer is not adapted.
    """
    if not is_adapted(module):
        raise TargetError(f"{type(module).__name__} is not adapted, there is nothing to detach")
    module.__class__ = module.dsee_base  # type: ignore[assignment]
    for name in (PARAMETER, *BUFFERS, *ATTRIBUTES):
        delattr(module, name)


def is_adapted(module: object) -> bool:
    """Whether `attach` was applied to this very module."""
    return isinstance(module, AdaptedLayer)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """What is adapted in a model, in its order: linear layers by module name, experts by their parameter's name."""
    return {
        name: weight
        for outer, module in model.named_modules()
        if isinstance(module, Adapted)
        for name, weight in module.dsee_weights(outer).items()
    }


def weight_name(name: str, spec: AdapterSpec) -> str:
    """The parameter's name of what `adapted_layers` calls `name`."""
    return name if spec.experts else f"{name}.weight"


def train_under_mask(module: Any, on: bool) -> None:
    """Whether an adapted layer computes x ((W + D) * M)^T with M = (W != 0), or x W^T + x D^T.

    Under the mask a pruned matrix is trained as the masked export has it. Dropout on the adapter's input then
    costs a second product: x W^T + dropout(x) (D * M)^T.

    Args:
        module: an adapted layer.
        on: whether its weight's zeros are a mask.

    Raises:
        TargetError: the weight is trained too, so its zeros are no mask.
    """
    if on and module.weight.requires_grad:
        raise TargetError(
            f"this {type(module).__name__} is adapted and its weight is trained as well, so the weight's zeros do not "
            "last; leave it out of trained_modules, or prune with mask_update=False"
        )
    module.dsee_under_mask = on


def restore_under_mask(model: nn.Module) -> None:
    """Make every adapted layer compute as the record of pruned weights says. Local."""
    pruned = model_state(model).pruned
    for name, layer in adapted_layers(model).items():
        how = pruned.get(weight_name(name, layer.dsee_spec), {})
        train_under_mask(layer, bool(how.get(MASK_UPDATE)))


def delta_record(module: Any, flat: Tensor) -> Delta:
    """What the layer adds to its weight.

    Args:
        module: an adapted layer.
        flat: whole `dsee_flat`; under ZeRO-3 the parameter itself is not.
    """
    return Delta.of(module.dsee_spec, flat, module.dsee_rows, module.dsee_cols)
