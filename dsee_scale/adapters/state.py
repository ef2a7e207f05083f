"""What was done to a model: a small record that travels on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dsee_scale.config import DSEEConfig
from dsee_scale.errors import PartitionError

MASK_UPDATE = "mask_update"
"""In the record of a pruned weight: that its update is trained under the mask."""


@dataclass(frozen=True)
class MaskFiles:
    """Files that hold a model's masks as they are now, so that a further checkpoint need not write them again.

    Attributes:
        folder: the saved folder that they are in.
        files: their lines of its manifest, by name.
        kept: pruned weight -> entries that are not zero.
        prunings: `ModelState.prunings` at that time.
        sample: what some of this rank's entries were then.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    kept: Mapping[str, int]
    prunings: int
    sample: list[int]


@dataclass
class ModelState:
    """The injection and the prunings of one model.

    Attributes:
        config: settings of the injection, None if there was none.
        pruned: weight name -> how it was pruned, e.g. {"pattern": "unstructured"}. The zeros of these
            weights are their mask; no other copy of a mask exists.
        prunings: how often masks have changed.
        masks: where they were last saved, maybe before they changed; None for nowhere.
        blocks: sizes of the blocks of a model that no config describes, as `load_pretrained` read them: block ->
            heads, neurons and the like; None for any other model.
        broken: why this model must not be used any more, None for a sound one.
    """

    config: DSEEConfig | None = None
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)
    prunings: int = 0
    masks: MaskFiles | None = None
    blocks: Mapping[str, Mapping[str, int]] | None = None
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
