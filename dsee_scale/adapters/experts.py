"""Adapted experts: the module that holds a layer's experts in fused parameters, given a subclass in place.

Its forward is the grouped one of transformers, with each expert's update in its products (`grouped`). As on linear
layers the base parameters keep their names, and A, B and the values of S2 of one parameter, of all its experts, lie in
one flat parameter on the same module, so that ZeRO-3 fetches experts and updates together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.kernels.factors import make_fold
from dsee_scale.adapters.kernels.grouped import ExpertUpdate, expert_product, grouped_mm
from dsee_scale.adapters.linear import Adapted, FlatViews, initial_values, reject_replaced_forward
from dsee_scale.adapters.state import warn_of_new_zeros
from dsee_scale.adapters.support import check_support
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.errors import TargetError

COLUMNS = 8
"""What an expert's thin factors have a multiple of: PyTorch's grouped product wants strides of 16 bytes."""
IMPLEMENTATION = "grouped_mm"
"""The one of transformers' implementations whose sums are ours: with it injection changes no bit."""
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class ExpertLayout:
    """How a module holds its experts, as transformers declares it.

    Attributes:
        up: the parameter with the matrices before the activation.
        down: the one with those after it.
        transposed: whether a matrix is stored I x O.
        gated: whether `up` holds gate and up together, 2I outputs.
        interleaved: whether these alternate; else the gate's outputs come first.
        bias: whether each expert has biases, in `up + "_bias"` and `down + "_bias"`.
    """

    up: str
    down: str
    transposed: bool
    gated: bool
    interleaved: bool
    bias: bool


class AdaptedExperts(Adapted):
    """Mixin in front of the class of a module that holds experts; `attach_experts` makes instances.

    For each adapted parameter there are `dsee_NAME` (A, B and values), and the buffers `dsee_NAME_rows` and
    `dsee_NAME_cols`; `ExpertWeight` has them under the names that a linear layer's have.

    Attributes:
        dsee_specs: of each adapted parameter.
        dsee_masked: whether its zeros mask its update too.
        dsee_updates: the above, prepared for the products; derived, in no state dict.
        dsee_disabled: whether the experts compute without their updates.
        dsee_base: the module's own class.
    """

    dsee_base: type[nn.Module]
    dsee_disabled: bool = False
    dsee_specs: dict[str, AdapterSpec]
    dsee_masked: dict[str, bool]
    dsee_updates: dict[str, ExpertUpdate]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts of what they make of it, times their weights.

        Args:
            hidden_states: (T, H) tokens.
            top_k_index: (T, K) the experts of each.
            top_k_weights: (T, K).

        Returns:
            (T, H).
        """
        if self.dsee_disabled:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        module: Any = self
        num_tokens, top_k = top_k_index.shape
        experts_S, order_S = torch.sort(top_k_index.reshape(-1))
        after = torch.arange(1, module.num_experts + 1, device=experts_S.device)
        ends_E = torch.searchsorted(experts_S, after).to(torch.int32)
        up = "gate_up_proj" if module.has_gate else "up_proj"
        h = self._product(up, hidden_states[order_S // top_k], ends_E, experts_S)
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = self._product("down_proj", h, ends_E, experts_S)
        y = y * top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return y[back_S].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, x_SI: Tensor, ends_E: Tensor, experts_S: Tensor) -> Tensor:
        """Tokens times their experts' matrices, with the update where there is one, plus their biases."""
        module: Any = self
        weight = getattr(self, name)
        if name in self.dsee_specs:
            flat, masked = getattr(self, f"dsee_{name}"), self.dsee_masked[name]
            y = expert_product(x_SI, weight, flat, ends_E, self._update(name), masked=masked)
        else:
            matrices = weight if module.is_transposed else weight.transpose(1, 2)
            y = grouped_mm(x_SI.to(weight.dtype), matrices, ends_E)
        return y + getattr(self, f"{name}_bias")[experts_S] if module.has_bias else y

    def _update(self, name: str) -> ExpertUpdate:
        """What the product needs besides the parameters; made anew if the buffers were moved."""
        if self.dsee_updates[name].rows is not getattr(self, f"dsee_{name}_rows"):
            self.dsee_prepare(name)
        return self.dsee_updates[name]

    def dsee_prepare(self, name: str) -> None:
        """Prepare for the support in the buffers. Call it after writing other positions to them."""
        spec = self.dsee_specs[name]
        rows, cols = getattr(self, f"dsee_{name}_rows"), getattr(self, f"dsee_{name}_cols")
        transposed = bool(self.is_transposed)
        fold = None if rows.is_meta else make_fold(spec, rows, cols, _most_entries(spec), COLUMNS)
        self.dsee_updates[name] = ExpertUpdate(spec, rows, cols, transposed, fold)

    def dsee_weights(self, name: str) -> dict[str, Any]:
        """The adapted parameters."""
        return {f"{name}.{attribute}": ExpertWeight(self, attribute) for attribute in self.dsee_specs}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        warn_of_new_zeros(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.dsee_specs:
            self.dsee_prepare(name)

    def extra_repr(self) -> str:
        """The adapters."""
        return ", ".join(
            f"{name}: rank={spec.rank}, num_sparse={spec.num_sparse}, shared_a={spec.shared_a}"
            f"{', under mask' if self.dsee_masked[name] else ''}"
            for name, spec in self.dsee_specs.items()
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle through the base class: the subclass is made at run time and has no import name."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank, (self.dsee_base,), *state)


class ExpertWeight(FlatViews):
    """One adapted parameter of experts, with the names that an adapted linear layer has. It holds nothing itself.

    Attributes:
        module: the module that holds the experts.
        attribute: the parameter's name in it.
    """

    bias = None

    def __init__(self, module: AdaptedExperts, attribute: str) -> None:
        self.module, self.attribute = module, attribute

    @property
    def weight(self) -> nn.Parameter:
        """(E, M, J), all experts' matrices as they are stored."""
        return getattr(self.module, self.attribute)

    @property
    def dsee_spec(self) -> AdapterSpec:  # type: ignore[override]
        """Of the parameter as one matrix (E*M, J)."""
        return self.module.dsee_specs[self.attribute]

    @property
    def dsee_flat(self) -> nn.Parameter:  # type: ignore[override]
        """A, B and values of all experts."""
        return getattr(self.module, f"dsee_{self.attribute}")

    @property
    def dsee_rows(self) -> Tensor:
        """int32 (E*N,), as `ExpertUpdate.rows`."""
        return getattr(self.module, f"dsee_{self.attribute}_rows")

    @property
    def dsee_cols(self) -> Tensor:
        """int32 (E*N,), as `ExpertUpdate.cols`."""
        return getattr(self.module, f"dsee_{self.attribute}_cols")

    @property
    def dsee_under_mask(self) -> bool:
        """Whether the weight's zeros mask the update too."""
        return self.module.dsee_masked[self.attribute]

    @dsee_under_mask.setter
    def dsee_under_mask(self, on: bool) -> None:
        self.module.dsee_masked[self.attribute] = on

    @property
    def dsee_disabled(self) -> bool:
        """Whether the module computes without its updates."""
        return self.module.dsee_disabled

    @dsee_disabled.setter
    def dsee_disabled(self, on: bool) -> None:
        self.module.dsee_disabled = on

    def dsee_prepare(self) -> None:
        """See `AdaptedExperts.dsee_prepare`."""
        self.module.dsee_prepare(self.attribute)


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """How a module holds fused experts; None for one that holds none, or in a way that is not known here."""
    held: Any = module
    if not hasattr(module, "is_transposed") or not hasattr(module, "is_concatenated"):
        return None
    up = "gate_up_proj" if held.has_gate else "up_proj"
    params = [module._parameters.get(name) for name in (up, "down_proj")]
    if None in params or getattr(module, "has_post_expert_norm", False):
        return None
    return ExpertLayout(
        up, "down_proj", held.is_transposed, held.has_gate, not held.is_concatenated, held.has_bias
    )


def fused_experts(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters with all experts' matrices, where a module holds them in a way that is known here."""
    layout = expert_layout(module)
    return (layout.up, layout.down) if layout else ()


def attach_experts(
    module: nn.Module,
    attribute: str,
    spec: AdapterSpec,
    rows: Tensor,
    cols: Tensor,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Adapt one parameter of a module that holds experts, in place. Reads nothing of the weight.

    Args:
        module: it has what `fused_experts` looks for; other parameters of it may be adapted already.
        attribute: the parameter's name.
        spec: of the parameter as one matrix, a slice for each expert.
        rows, cols: (E*N,) of each entry of S2 in that matrix, sorted by (slice, row, col).
        generator: source of A; None takes PyTorch's global one.
        dtype: of A, B and values.
        device: where they live.

    Raises:
        TargetError: the experts cannot be adapted, see `check_experts`, or the support does not fit.
    """
    check_experts(type(module).__name__, module)
    check_support(spec, rows, cols)
    values = initial_values(spec, generator).to(device=device, dtype=dtype)
    module.register_parameter(f"dsee_{attribute}", nn.Parameter(values))
    for key, positions in (("rows", rows), ("cols", cols)):
        where = positions.to(device=device, dtype=torch.int32, copy=True)
        module.register_buffer(f"dsee_{attribute}_{key}", where)
    if not isinstance(module, AdaptedExperts):
        module.__class__ = _adapted_class(type(module))
        module.dsee_specs, module.dsee_masked, module.dsee_updates = {}, {}, {}  # type: ignore[assignment]
    assert isinstance(module, AdaptedExperts)
    module.dsee_specs[attribute], module.dsee_masked[attribute] = spec, False
    module.dsee_prepare(attribute)


def let_gradients_through(block: Any) -> None:
    """Let the input of the module around experts require gradients whenever anything in it is trained. Local.

    DeepSpeed (0.19.8) takes the blocks of Mixtral and Qwen-MoE for leaf modules of ZeRO-3 and reduces the gradients of
    all that is in them (router, shared expert, experts) once the input has its own. Without one, as before the first
    adapter of a model, it would do so before any is there. Calling this twice is as good as once.
    """
    if not getattr(block, "_dsee_input_hook", False):
        block._dsee_input_hook = True
        block.register_forward_pre_hook(_require_gradient)


def _require_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook: the same values, with a gradient. They are a copy, since some blocks write into their input."""
    if not torch.is_grad_enabled() or not args or args[0].requires_grad:
        return None
    if not any(param.requires_grad for param in block.parameters()):
        return None
    return (args[0].detach().requires_grad_().clone(), *args[1:])


def check_experts(name: str, module: nn.Module) -> None:
    """Refuse experts whose forward is not the one that `AdaptedExperts` has.

    Raises:
        TargetError: naming what differs, and the way out.
    """
    held: Any = module
    reject_replaced_forward(name, module)
    if getattr(held, "_is_expert_parallel", False):
        raise TargetError(f"{name} is spread over ranks by expert parallelism; load the model without it")
    found = getattr(getattr(held, "config", None), "_experts_implementation", IMPLEMENTATION)
    if found != IMPLEMENTATION:
        raise TargetError(
            f"{name} computes its experts by {found!r}, expected {IMPLEMENTATION!r}, whose sums the adapted ones "
            f"share: call model.set_experts_implementation({IMPLEMENTATION!r}) first"
        )


def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        namespace = {"__module__": __name__, "dsee_base": base}
        _CLASSES[base] = type(f"Adapted{base.__name__}", (AdaptedExperts, base), namespace)
    return _CLASSES[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


def _most_entries(spec: AdapterSpec) -> int:
    """Entries of S2 up to which the thin products are thin: their columns less than half of W's smaller side."""
    width = spec.width or spec.shape[0]
    return min(width, spec.shape[1]) // 2 - spec.rank
