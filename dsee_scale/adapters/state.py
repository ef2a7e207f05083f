"""What was done to a model: a small record that travels on the model itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import open_partition
from dsee_scale.partition.zero3 import is_partitioned

MASK_UPDATE = "mask_update"
"""In the record of a pruned weight: that its update is trained under the mask."""
MANY_ZEROS = 0.05
"""Share of a weight's entries; more new zeros than that are no accident."""
_LOADING = "_dsee_loading"
"""On an adapted module whose partitioned weights may be about to change: what they were, and the hook that looks."""


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


def reject_unusable(model: nn.Module) -> None:
    """Raise for a model that is broken, PEFT's, or a part of the one with the record. Local."""
    reject_broken(model)
    reject_peft(model)
    reject_part(model)


def reject_part(model: nn.Module) -> None:
    """Raise TargetError for a model whose adapters a part of it, or a whole around it, has on record. Local."""
    if model_state(model).config is not None or not any(hasattr(m, "dsee_weights") for m in model.modules()):
        return
    parts = (
        name for name, m in model.named_modules() if name and getattr(vars(m).get("_dsee"), "config", None)
    )
    where = next((f"on its part {name!r}" for name in parts), "on a model that this is a part of")
    raise TargetError(
        f"this {type(model).__name__} has adapters, and inject was called {where}, which holds the record of adapters "
        "and masks; expected the same model for inject, prune, save and export: give each of them the whole model "
        "(target_modules and modules say which parts are meant). Nothing was changed"
    )


def warn_of_new_zeros(module: Any, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Warn of weights from a state dict that bring a mask along which nothing records. Local.

    Under ZeRO-3 they are empty, and DeepSpeed's `load_checkpoint` writes the shards after them: the next forward of
    the module looks at those, or `warn_of_loaded_zeros` if that comes first.

    Args:
        module: an adapted one, before it reads the state dict.
        state_dict: anything in it but tensors of the weights' shapes is left alone.
        prefix: of the module's own names in it.
    """
    names = {id(param): name for name, param in module.named_parameters(recurse=False)}
    adapted = [each for each in module.dsee_weights("").values() if not each.dsee_under_mask]
    if any(is_partitioned(each.weight) for each in adapted):
        if _LOADING not in vars(module):  # else the zeros may have come already
            handle = module.register_forward_pre_hook(_before_forward)
            setattr(module, _LOADING, (_stored_entries(module), handle))
        return
    for each in adapted:
        before, weight = each.weight, state_dict.get(f"{prefix}{names.get(id(each.weight))}")
        if not isinstance(weight, Tensor) or weight.shape != before.shape or weight.is_meta or before.is_meta:
            continue
        _warn_if_many(count_nonzero(before) - count_nonzero(weight), weight.numel())


def warn_of_loaded_zeros(model: nn.Module) -> None:
    """`warn_of_new_zeros` for what was loaded since the last forward, before a pass reads the weights. Local."""
    for module in model.modules():
        if _LOADING in vars(module):
            _look_at_loaded(module)


def _before_forward(module: nn.Module, _: Any) -> None:
    """Forward pre-hook, for one forward; within compiled code it does nothing."""
    if not torch.compiler.is_compiling():
        _look_at_loaded(module)


def _look_at_loaded(module: Any) -> None:
    before, handle = vars(module).pop(_LOADING)
    handle.remove()
    for name, (kept, numel) in _stored_entries(module).items():
        _warn_if_many(before.get(name, (0, 0))[0] - kept, numel)


def _stored_entries(module: Any) -> dict[str, tuple[int, int]]:
    """Of each adapted weight without a mask, how many entries of this rank's are not zero, and how many there are."""
    if not hasattr(module, "dsee_weights"):
        return {}  # detached
    try:
        partition = open_partition(module)
    except PartitionError:  # DeepSpeed loads it all the same, and every pass will say so
        return {}
    weights = {name: each for name, each in module.dsee_weights("").items() if not each.dsee_under_mask}
    shards = {name: partition.shard(each.weight).data for name, each in weights.items()}
    return {name: (count_nonzero(shard), shard.numel()) for name, shard in shards.items()}


def _warn_if_many(new_zeros: int, numel: int) -> None:
    if new_zeros > MANY_ZEROS * numel:
        warnings.warn(
            "a state dict or a checkpoint of DeepSpeed's brings zeros into the weights of adapted layers, and no state "
            "dict says that they are a mask: updates will not be masked, and save_adapter and export_model know of no "
            "pruning. Save a pruned model by dsee_scale.save_adapter or save_training_state and read it by "
            "dsee_scale.load_adapter",
            stacklevel=3,
        )


def model_state(model: nn.Module) -> ModelState:
    """The record on an unwrapped model, made on first use."""
    if not hasattr(model, "_dsee"):
        model._dsee = ModelState()  # type: ignore[assignment]
    return model._dsee  # type: ignore[return-value]
