"""What was done to a model: a small record that travels on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dsee_scale.config import DSEEConfig

MASK_UPDATE = "mask_update"
"""In the record of a pruned weight: that its update is trained under the mask."""


@dataclass
class ModelState:
    """The injection and the prunings of one model.

    Attributes:
        config: settings of the injection, None if there was none.
        pruned: weight name -> how it was pruned, e.g. {"pattern": "unstructured"}. The zeros of these
            weights are their mask; no other copy of a mask exists.
    """

    config: DSEEConfig | None = None
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)


def model_state(model: nn.Module) -> ModelState:
    """The record on an unwrapped model, made on first use."""
    if not hasattr(model, "_dsee"):
        model._dsee = ModelState()  # type: ignore[assignment]
    return model._dsee  # type: ignore[return-value]
