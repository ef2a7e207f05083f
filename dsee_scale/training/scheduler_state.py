"""A learning-rate scheduler in a checkpoint: plain values in, plain values out."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dsee_scale.checkpoint.files import damaged
from dsee_scale.distributed import log_rank0
from dsee_scale.errors import ConfigError

logger = logging.getLogger(__name__)


def plain_scheduler(scheduler: Any) -> Any:
    """The scheduler without accelerate's and transformers' wrappers."""
    while not isinstance(scheduler, LRScheduler) and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def scheduler_record(scheduler: Any) -> dict[str, Any] | None:
    """A scheduler's class and state as JSON can hold it; None for LambdaLR, whose rates its step alone tells. Local.

    Raises:
        ConfigError: its state holds something else than plain values.
    """
    if isinstance(scheduler, LambdaLR) or not hasattr(scheduler, "state_dict"):
        return None
    name = type(scheduler).__name__
    return {"class": name, "state": _encoded(scheduler.state_dict(), f"lr_scheduler {name}")}


def restore_scheduler(scheduler: Any, saved: dict[str, Any] | None, step: int, where: str) -> None:
    """Let a freshly made scheduler go on. Local.

    Args:
        scheduler: without wrappers. A rate that is a function of the step alone goes on from it, also where a resumed
            run has changed the function.
        saved: what `scheduler_record` gave; None of older checkpoints.
        step: optimizer steps that are done.
        where: the checkpoint.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * factor(step) for base, factor in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
    elif saved is not None and saved["class"] == type(scheduler).__name__:
        with damaged(where):
            scheduler.load_state_dict(_decoded(saved["state"]))
    elif hasattr(scheduler, "state_dict") and not type(scheduler).__module__.startswith("deepspeed"):
        # DeepSpeed's own travel with the engine.
        log_rank0(
            logger,
            "%s holds no state of lr_scheduler %s (found %s): it starts over",
            where,
            type(scheduler).__name__,
            saved["class"] if saved else "none",
        )


def _encoded(value: Any, name: str) -> Any:
    """JSON's own values as they are; what it would change (keys that are no text, tuples, infinity) with its type."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, list):
        return [_encoded(part, name) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(part, name) for part in value]}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[_encoded(key, name), _encoded(part, f"{name}.{key}")] for key, part in value.items()]}
    raise ConfigError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; expected numbers, text, lists and dicts: "
        "let the scheduler's state_dict leave it out"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decoded(part) for part in content)
    pairs = {_decoded(key): _decoded(part) for key, part in content}
    return Counter(pairs) if kind == "counter" else pairs
