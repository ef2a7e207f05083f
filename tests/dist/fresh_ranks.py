"""Whole runs of `dsee-scale run` on fresh processes that a fault may hit at any moment.

A pool's workers are reused and must stay alive; here each run has processes of its own, from the same server.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.dist.pool import as_rank, fork_server, free_port

PLACES = {
    "load": ("dsee_scale.training.run", "load_model"),
    "decompose": ("dsee_scale.passes.decompose_model", "find_support"),
    "step": ("dsee_scale.training.base_trainer", "AdapterTrainer.training_step"),
    "prune": ("dsee_scale.training.trainer", "prune"),
    "save": ("dsee_scale.training.base_trainer", "AdapterTrainer._save_checkpoint"),
    "settle": ("dsee_scale.checkpoint.folder", "NewFolder.settle"),
    "commit": ("dsee_scale.checkpoint.folder", "NewFolder.commit"),
    "export": ("dsee_scale.training.run", "export_model"),
    "check": ("dsee_scale.training.run", "check_export"),
}
"""Where a fault may begin: module and name of what is then called."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal that one rank gets a moment after it has entered a function for the n-th time, once or more often."""

    place: str
    call: int
    delay: float = 0.0
    rank: int = 1
    signal: int = signal.SIGKILL
    times: int = 1

    def install(self) -> None:
        """Local. From now on the function counts its calls."""
        module, names = PLACES[self.place]
        *path, last = names.split(".")
        owner: Any = importlib.import_module(module)
        for name in path:
            owner = getattr(owner, name)
        original, calls = getattr(owner, last), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                threading.Timer(self.delay, self._send).start()
            return original(*args, **kwargs)

        setattr(owner, last, counted)

    def _send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), self.signal)
            time.sleep(0.02)


def launch(
    recipe: Path, *flags: str, fault: Fault | None = None, world: int = 2, seconds: float = 300
) -> list[int]:
    """One run; the ranks' exit codes, negative for a signal. What they wrote is in `<recipe>.log.<rank>`.

    Ranks that got SIGSTOP are ended once the others are gone.

    Raises:
        AssertionError: a rank did not end in time.
    """
    context, port = fork_server(), free_port()
    words = [str(recipe), *flags]
    ranks = [context.Process(target=_rank, args=(r, world, port, words, fault)) for r in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    stopped = [ranks[fault.rank]] if fault is not None and fault.signal == signal.SIGSTOP else []
    try:
        for process in ranks:
            if process not in stopped:
                process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, p in enumerate(ranks) if p.is_alive() and p not in stopped]
        for rank in late:
            os.kill(int(ranks[rank].pid or 0), signal.SIGUSR1)
        time.sleep(1 if late else 0)
        assert not late, f"ranks {late} still wait after {seconds} s\n{logs(recipe, world)}"
    finally:
        _end(ranks)
    return [int(process.exitcode or 0) for process in ranks]


def logs(recipe: Path, world: int = 2) -> str:
    """The end of what every rank wrote."""
    paths = [Path(f"{recipe}.log.{rank}") for rank in range(world)]
    return "\n".join(f"rank {rank}:\n{path.read_text()[-4000:]}" for rank, path in enumerate(paths))


def _end(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def _rank(rank: int, world: int, port: int, words: list[str], fault: Fault | None) -> None:
    log = os.open(f"{words[0]}.log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1)  # a rank that is late is asked where it is
    as_rank(rank, world, port)
    import torch

    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        fault.install()
    from dsee_scale.cli import run_recipe

    code = run_recipe(words)
    sys.stdout.flush()
    sys.stderr.flush()
    # The end of a fresh interpreter, without what multiprocessing would wait for.
    os._exit(code)
