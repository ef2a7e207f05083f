"""Worker processes with real DeepSpeed on gloo, started once and shared by all distributed tests.

Workers are forked from one server that has imported everything: a fresh import of DeepSpeed costs seconds a
process, a fork milliseconds. A task is a module-level function of a test file; each rank runs it and sends its
result back. A task that fails or does not end in time takes its pool down, and the next task starts a new one.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks._ranks import free_port as free_port

PRELOADED = [
    "torch._dynamo",  # must be imported before any zero.Init context
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "peft",
    "sklearn.metrics",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "dsee_scale.training.run",
]
"""What a run needs, and what it would import later; one that is missing is passed over."""


def fork_server() -> ForkServerContext:
    """What ranks are started from. The server reads the environment once, when the first of them starts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def as_rank(rank: int, world_size: int, port: int) -> None:
    """Local. What a launcher tells a process; and all that was imported is left out of garbage collections.

    DeepSpeed collects garbage whenever it makes an engine, which took longer than the rest of a small test.
    """
    gc.freeze()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


class RankError(AssertionError):
    """A task failed on a rank; carries that rank's traceback."""


class WorkerPool:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, task: Callable[..., Any], *args: Any, timeout: float = 150.0) -> list[Any]:
        """Run `task(*args)` on every rank; the results in rank order."""
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((task.__module__, task.__qualname__, args))
        return self._collect(timeout)

    def _start(self) -> None:
        context, port = fork_server(), free_port()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self.workers)}
        while pending:
            # Once a rank has failed the others may be waiting for it: give them a moment, then stop.
            left = min(deadline - time.monotonic(), 5.0 if failures else 1e9)
            ready = wait(list(pending), timeout=max(left, 0))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
        if failures or pending:
            self.stop()
            stuck = f"ranks {sorted(pending.values())} did not end" if pending else ""
            raise RankError("\n".join(f"rank {r}:\n{text}" for r, text in sorted(failures.items())) + stuck)
        return [results[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    as_rank(rank, world_size, port)
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    os.chdir(tempfile.gettempdir())
    deepspeed.init_distributed("gloo")
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        # A run's config would make transformers partition the next task's models while it builds them.
        unset_hf_deepspeed_config()
        # DeepSpeed keeps one group for hierarchical partitioning, and refuses to make the next task's.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        try:
            task: Any = importlib.import_module(module)
            for part in name.split("."):
                task = getattr(task, part)
            pipe.send((True, task(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
