"""What was done to a model: a small record that travels on the model itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import PartitionError, TargetError

MASK_UPDATE = "mask_update"
"""In the record of a pruned weight: that its update is trained under the mask."""
MANY_ZEROS = 0.05
"""Share of a weight's entries; more new zeros than that are no accident."""


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


def reject_peft(model: nn.Module) -> None:
    """Raise TargetError for a model with adapters of PEFT's, whose weights would be taken for its own. Local."""
    peft: Any = sys.modules.get("peft")
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None:
        return
    kinds = (peft.PeftModel, tuners.BaseTunerLayer)
    found = next(
        (name or type(model).__name__ for name, m in model.named_modules() if isinstance(m, kinds)), None
    )
    if found is not None:
        raise TargetError(
            f"{found} belongs to PEFT, and dsee_scale knows nothing of its adapters; expected a model without: go on "
            "with what model.merge_and_unload() returns, or save the LoRA and read it into a fresh model by "
            "dsee_scale.load_adapter"
        )


def warn_of_new_zeros(before: Tensor, weight: Any) -> None:
    """Warn of a weight from a state dict that brings a mask along which nothing records. Local.

    Args:
        before: the adapted layer's own weight.
        weight: the state dict's; anything but a tensor of its shape is left alone.
    """
    if not isinstance(weight, Tensor) or weight.shape != before.shape or weight.is_meta or before.is_meta:
        return
    more = count_nonzero(before) - count_nonzero(weight)
    if more > MANY_ZEROS * weight.numel():
        warnings.warn(
            "a state dict brings zeros into the weights of adapted layers, and no state dict says that they are a "
            "mask: updates will not be masked, and save_adapter and export_model know of no pruning. Save a pruned "
            "model by dsee_scale.save_adapter or save_training_state and read it by dsee_scale.load_adapter",
            stacklevel=2,
        )


def model_state(model: nn.Module) -> ModelState:
    """The record on an unwrapped model, made on first use."""
    if not hasattr(model, "_dsee"):
        model._dsee = ModelState()  # type: ignore[assignment]
    return model._dsee  # type: ignore[return-value]
