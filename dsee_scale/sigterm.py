"""SIGTERM as launchers send it: often twice, to the whole group and then by the launcher to each of its ranks."""

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

PASSED_ON = 35.0
"""Seconds after the first one in which others count as that one; launchers send SIGKILL after 30."""


def expect_it_again() -> None:
    """Local, when one has been taken note of: from now on another one ends the process if it is one of its own."""
    first = time.monotonic()

    def again(number: int, frame: Any) -> None:
        if time.monotonic() - first > PASSED_ON:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, again)


def shelter_workers(loader: Any) -> None:
    """Let a data loader's workers outlive a SIGTERM, which launchers send to them too: the rank has a step to end.

    Workers that are not forked (`dataloader_multiprocessing_context`) stay as they are.
    """
    loader = getattr(loader, "base_dataloader", loader)  # the one inside of accelerate's
    context = loader.multiprocessing_context or multiprocessing.get_context()
    if loader.num_workers and context.get_start_method() == "fork":
        loader.multiprocessing_context = _Context()
        loader.worker_init_fn = functools.partial(_start, loader.worker_init_fn)


def _start(then: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    if then is not None:
        then(worker)


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        """What `multiprocessing` calls when the rank itself ends, and then waits for."""
        self._send_signal(signal.SIGUSR1)  # type: ignore[attr-defined]


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process: Any) -> Any:
        return _Popen(process)


class _Context(ForkContext):
    Process = _Process  # type: ignore[assignment]
