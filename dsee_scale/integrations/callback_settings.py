"""What `DSEECallback` may be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsee_scale.config import PruneConfig
from dsee_scale.pruning.schedule import CubicSchedule, schedule_problems


def setting_problems(configs: Sequence[Any], at: Any, calibration_batches: Any) -> list[str]:
    """A sentence for each setting that makes no sense.

    Args:
        configs: what to remove.
        at, calibration_batches: as `DSEECallback` takes them.
    """
    problems = [
        f"prune holds a {type(each).__name__} ({each!r:.40}), expected PruneConfig(...)"
        for each in configs
        if not isinstance(each, PruneConfig)
    ]
    if type(calibration_batches) is not int or calibration_batches < 1:
        problems.append(
            f"calibration_batches must be a whole number from 1 on, found {calibration_batches!r}"
        )
    if isinstance(at, bool) or not isinstance(at, (int, float, CubicSchedule, type(None))):
        problems.append(f"at {at!r} is neither a fraction of the training nor a step, nor a CubicSchedule")
    if problems:
        return problems
    if bool(configs) != (at is not None):
        problems.append("prune and at go together: what to remove, and when")
    if isinstance(at, CubicSchedule):
        problems += schedule_problems(configs)
    elif isinstance(at, float) and not 0 <= at < 1:
        problems.append(f"at {at!r} is no fraction of the training in [0, 1), nor a whole step")
    elif isinstance(at, int) and at < 0:
        problems.append(f"at {at!r} must be a step from 0 on")
    return problems
