"""What DeepSpeed says of the ZeRO section of its own config, before an engine is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = (1, 2, 3)


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
    return []
