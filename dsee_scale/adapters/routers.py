"""Routers that never choose removed experts again: they compute as the smaller model's router will.

A router is given a subclass in place. Its forward is the stock one, run on the rows of the experts that are left,
whose indices are then those of the whole layer again. So gates, groups and normalisation are exactly those of the
exported model, in whatever way an architecture computes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dsee_scale.adapters.matrices import ShapeOf
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import find_units


class MaskedRouter:
    """What is mixed into a router's class."""

    dsee_base: type[nn.Module]
    dsee_kept: Tensor
    dsee_experts: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(logits, gate values, indices) of the whole layer; logits of removed experts are -inf."""
        logits, gates, chosen = self.dsee_base.forward(self._smaller(), *args, **kwargs)
        everyone = logits.new_full((*logits.shape[:-1], self.dsee_experts), float("-inf"))
        return everyone.index_copy(-1, self.dsee_kept, logits), gates, self.dsee_kept[chosen]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle through the base class: the subclass is made at run time and has no import name."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank, (self.dsee_base,), *state)

    def _smaller(self) -> nn.Module:
        """The router of the experts that are left, on views of this one's tensors."""
        module: Any = self
        smaller = object.__new__(self.dsee_base)
        tensors = {name: getattr(self, name) for name in (*module._parameters, *module._buffers)}
        left = {
            name: value[self.dsee_kept] if _by_expert(value, self.dsee_experts) else value
            for name, value in tensors.items()
        }
        smaller.__dict__.update(module.__dict__, _parameters={}, _buffers={}, **left)
        smaller.__dict__["num_experts"] = len(self.dsee_kept)
        return smaller


def _by_expert(value: Tensor | None, experts: int) -> bool:
    return value is not None and value.dim() > 0 and value.shape[0] == experts


def _masked_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(stock.__name__, (MaskedRouter, stock), {"dsee_base": stock})


def _blank(stock: type[nn.Module]) -> nn.Module:
    masked = _masked_class(stock)
    return masked.__new__(masked)


def mask_router(router: Any, gone: Tensor) -> None:
    """Never choose some experts again. Local.

    Args:
        router: a router of transformers; one that is masked already is masked anew.
        gone: (E,) bool.
    """
    kept = (~gone).nonzero().flatten().to(next(router.parameters()).device)
    if not isinstance(router, MaskedRouter):
        router.__class__ = _masked_class(type(router))
    router.dsee_experts = len(gone)
    router.register_buffer("dsee_kept", kept, persistent=False)


def mask_routers(model: nn.Module, shape_of: ShapeOf) -> None:
    """Make every router of a model choose as the record of removed experts says. Local."""
    if not any("experts" in how for how in model_state(model).pruned.values()):
        return
    for layer in find_units(model, "experts", shape_of):
        gone = removed_units(model, layer)
        if gone.any():
            mask_router(layer.router, gone)


def router_tensors(router: nn.Module, experts: int, shape_of: ShapeOf) -> list[str]:
    """Names of a router's tensors that have a row for each expert, parameters and buffers."""
    sizes = {name: shape_of(param) for name, param in router.named_parameters()}
    sizes |= {name: buffer.shape for name, buffer in router.named_buffers() if name != "dsee_kept"}
    return [name for name, size in sizes.items() if len(size) and size[0] == experts]
