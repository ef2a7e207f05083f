"""A learning-rate scheduler in a checkpoint: plain values in, plain values out."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dsee_scale.checkpoint.files import damaged
from dsee_scale.distributed import log_rank0
from dsee_scale.scheduler_values import decoded, encoded

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
    return {"class": name, "state": encoded(scheduler.state_dict(), f"lr_scheduler {name}")}


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
            scheduler.load_state_dict(decoded(saved["state"]))
    elif hasattr(scheduler, "state_dict") and not type(scheduler).__module__.startswith("deepspeed"):
        # DeepSpeed's own travel with the engine.
        log_rank0(
            logger,
            "%s holds no state of lr_scheduler %s (found %s): it starts over",
            where,
            type(scheduler).__name__,
            saved["class"] if saved else "none",
        )
