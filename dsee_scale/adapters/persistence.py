"""Whether ZeRO-3 keeps the adapters resident, so that a layer costs one fetch: that of its frozen weight.

ZeRO-3 leaves a parameter whole on every rank if it has at most `stage3_param_persistence_threshold` elements
(1e5 unless set); a larger one is gathered before each use and dropped after it. Of an adapted layer, A has
K*R*I elements, B has S*R, and the values K*N: 65,536 for R = 16 and I = 4096. The Hugging Face Trainer
replaces "auto" by 10 * hidden_size, which is too low for any rank above 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsee_scale.adapters.linear import AdaptedLayer, adapted_layers

DEFAULT_THRESHOLD = 100_000
"""DeepSpeed's, where the config sets none."""


def check_persistence(ds_config: Mapping[str, Any], model: nn.Module) -> str | None:
    """Warning text if some adapter parameters would be fetched at every use, else None. Local.

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
    largest, needed = "", 0
    for name, layer in adapted_layers(model).items():
        assert isinstance(layer, AdaptedLayer)
        for suffix, numel in _sizes(layer).items():
            if numel > needed:
                largest, needed = f"{name}.{suffix}", numel
    if needed <= int(threshold):
        return None
    return (
        f"stage3_param_persistence_threshold is {int(threshold)}, and {largest} has {needed} elements: ZeRO-3 will "
        f"gather such adapters at every use. Set it to {needed} or more in the DeepSpeed config to keep them "
        "resident; their memory is that of the adapters, once per rank."
    )


def _sizes(layer: AdaptedLayer) -> dict[str, int]:
    """Elements of each adapter parameter, from the layer's settings: under ZeRO-3 the tensors are empty."""
    covered = sum(stop - start for start, stop in layer.dsee_slices)
    return {
        "dsee_A": len(layer.dsee_slices) * layer.dsee_rank * layer.dsee_shape[1],
        "dsee_B": covered * layer.dsee_rank,
        "dsee_values": layer.dsee_rows.numel(),
    }
