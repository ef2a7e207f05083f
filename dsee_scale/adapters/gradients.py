"""Adapters that no gradient reaches: their layer is never called, or what it computes does not reach the loss."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import TargetError


class GradientWatch:
    """Notes which adapters get a gradient; works where the gradients themselves are partitioned.

        watch = GradientWatch(model)
        loss = model(**batch).loss; loss.backward()
        watch.check()

    Experts that are modules of their own may get no token in a step, and are not asked for.

    Args:
        model: an injected model, unwrapped; under an engine the engine's module.
    """

    def __init__(self, model: nn.Module) -> None:
        layers: dict[str, Any] = adapted_layers(model)
        self._seen: set[str] = set()
        self._hooks = {
            name: layer.dsee_flat.register_hook(functools.partial(self._note, name))
            for name, layer in layers.items()
            if layer.dsee_spec.experts or "experts" not in name.split(".")
        }

    def _note(self, name: str, gradient: Tensor) -> None:
        self._seen.add(name)

    def check(self) -> None:
        """Call it once, after the first backward pass. Local.

        Raises:
            TargetError: naming the adapters without a gradient.
        """
        missing = [name for name in self._hooks if name not in self._seen]
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TargetError(
                f"the adapter of {missing[0]}{others} got no gradient in the first training step: the model uses the "
                "layer's weight without calling the layer, or leaves it out; take it out of target_modules"
            )
