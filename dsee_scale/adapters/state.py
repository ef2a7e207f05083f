"""What was done to a model: a small record that travels on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dsee_scale.config import DSEEConfig
from dsee_scale.errors import PartitionError

MASK_UPDATE = "mask_update"
"""In the record of a pruned weight: that its update is trained under the mask."""


@dataclass
class ModelState:
    """The injection and the prunings of one model.

    Attributes:
        config: settings of the injection, None if there was none.
        pruned: weight name -> how it was pruned, e.g. {"pattern": "unstructured"}. The zeros of these
            weights are their mask; no other copy of a mask exists.
        broken: why this model must not be used any more, None for a sound one.
    """

    config: DSEEConfig | None = None
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: str | None = None


def reject_broken(model: nn.Module) -> None:
    """Raise PartitionError for a model that a pass left half done. Local."""
    message = model_state(model).broken
    if message is not None:
        raise PartitionError(message)


def model_state(model: nn.Module) -> ModelState:
    """The record on an unwrapped model, made on first use."""
    if not hasattr(model, "_dsee"):
        model._dsee = ModelState()  # type: ignore[assignment]
    return model._dsee  # type: ignore[return-value]
