"""What DeepSpeed says of the ZeRO section of its own config, before an engine is made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

STAGES = (1, 2, 3)
SECTIONS = (
    *("amp", "comet", "compile", "compression_training", "csv_monitor", "eigenvalue", "elasticity"),
    *(
        "graph_harvesting",
        "hybrid_engine",
        "nebula",
        "pipeline",
        "sequence_parallel_size",
        "sparse_attention",
    ),
    *("sparse_gradients", "tensor_parallel", "tensorboard", "timers", "wandb", "weight_quantization"),
)
"""Top-level names of DeepSpeed's config that are no constants of its configuration modules."""


def zero_problems(config: Mapping[str, Any]) -> list[str]:
    """A sentence for each value of `zero_optimization` that DeepSpeed would refuse, or that is not supported. Local."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return [f"zero_optimization is {zero!r}, expected a section with a stage"]
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        return [
            f"zero_optimization.stage is {stage!r}, expected one of {', '.join(map(str, STAGES))}; without "
            "partitioning pass --deepspeed null and start with torchrun"
        ]
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except Exception as error:  # pydantic's, or whatever a validator of DeepSpeed's raises
        each = getattr(error, "errors", None)
        found = each() if callable(each) else []
        named = [f"zero_optimization.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found]
        return named or [f"zero_optimization: {error}"]
    if zero.get("zero_quantized_weights") is True:
        return [
            "zero_optimization.zero_quantized_weights is true, expected false: small weights that stay would be "
            "gathered as zeros, and a pruned model would be trained under another mask than its export; turn it off"
        ]
    return []


def misspelt_keys(config: Mapping[str, Any]) -> list[str]:
    """A sentence for each top-level key that DeepSpeed does not know but for a letter or two. Local.

    DeepSpeed passes over what it does not know. One that is like nothing it knows may be a newer version's, and passes.
    """
    from deepspeed.runtime import config as settings
    from deepspeed.runtime import constants

    words = {**vars(settings), **vars(constants)}.items()
    known = {value for name, value in words if name.isupper() and isinstance(value, str)} | set(SECTIONS)
    near = {
        key: difflib.get_close_matches(str(key), known, n=1, cutoff=0.85)
        for key in config
        if key not in known
    }
    return [
        f"{key!r} is no key of DeepSpeed's and would be passed over; did you mean {names[0]!r}?"
        for key, names in near.items()
        if names
    ]
