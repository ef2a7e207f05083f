"""Ranks fail together before there is a model: an error of one is raised by all."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

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


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after its exit handlers, but without tearing the interpreter down.

    Threads of gloo and of data loaders that are still alive then abort a finished process now and then
    ("terminate called without an active exception"), and the launcher counts the run as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
