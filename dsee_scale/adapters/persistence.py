"""Whether ZeRO-3 keeps the adapters resident or fetches each with its layer's weight; one fetch a layer either way.

ZeRO-3 leaves a parameter whole on every rank if it has at most `stage3_param_persistence_threshold` elements
(1e5 unless set); a larger one is gathered before each use and dropped after it. An adapted layer's has
K*R*I + S*R + K*N: 131,136 for R = 16, N = 64 and a square weight of 4096. The Hugging Face Trainer replaces
"auto" by 10 * hidden_size, which is too low for any rank above 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsee_scale.adapters.linear import adapted_layers

DEFAULT_THRESHOLD = 100_000
"""DeepSpeed's, where the config sets none."""


def check_persistence(ds_config: Mapping[str, Any], model: nn.Module) -> str | None:
    """What to tell the user if some adapters are not resident, else None. Local.

    Args:
        ds_config: DeepSpeed's JSON as a mapping; "auto" counts as the Trainer fills it in.
        model: an injected model, before or after partitioning.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return None
    threshold = zero.get("stage3_param_persistence_threshold", DEFAULT_THRESHOLD)
    if threshold == "auto":
        threshold = 10 * int(getattr(getattr(model, "config", None), "hidden_size", DEFAULT_THRESHOLD // 10))
    # From the settings: under ZeRO-3 the tensors are empty.
    sizes: dict[str, int] = {name: layer.dsee_spec.numel for name, layer in adapted_layers(model).items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if not sizes or sizes[largest] <= int(threshold):
        return None
    return (
        f"stage3_param_persistence_threshold is {int(threshold)}, and the adapter of {largest} has {sizes[largest]} "
        "elements: such adapters travel with their layer's weight, in the same message, at every use. Set it to "
        f"{sizes[largest]} or more in the DeepSpeed config to keep them resident instead: that costs their memory once "
        "per rank, and one small all-gather each after every optimizer step."
    )
