"""Ranks fail together before there is a model: an error of one is raised by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dsee_scale import errors

T = TypeVar("T")


def together(work: Callable[[], T], *, what: str) -> T:
    """Collective. Run `work` on every rank; if it fails anywhere, every rank raises the first rank's error.

    Args:
        work: local work without collectives.
        what: what failed, for an error that is none of ours, e.g. "reading the data".

    Returns:
        This rank's result.

    Raises:
        DSEEError: of the type and with the text that the lowest failing rank met.
    """
    problem: tuple[str, str] | None = None
    result: T | None = None
    try:
        result = work()
    except errors.DSEEError as error:
        problem = (type(error).__name__, str(error))
    except Exception as error:
        problem = ("ConfigError", f"{what} failed: {type(error).__name__}: {error}")
    problems: list[tuple[str, str] | None] = [problem]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            where = f"rank {rank}: " if len(problems) > 1 and not all(p == found for p in problems) else ""
            raise getattr(errors, found[0])(where + found[1])
    return result  # type: ignore[return-value]


def part_ways() -> None:
    """Collective. End the process groups when every rank is done: an exiting interpreter may abort in their threads."""
    together(lambda: None, what="finishing")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
