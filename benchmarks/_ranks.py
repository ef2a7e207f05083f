"""What benchmarks on several ranks share: starting them, their results and memory, and a decoder for them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port of this machine for ranks to meet at.

    It lies below those that systems hand out by themselves, so none is handed out between here and the first rank.
    """
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports from 10000 to 30000 is free")


def launch(
    script: str, words: Sequence[str], processes: int, threads: int, *, for_memory: bool = False
) -> list[Any]:
    """Start `script --worker FILE WORDS` on every rank; the JSON that each wrote to `FILE.RANK`.

    With `for_memory` what is allocated is touched and what is freed goes back to the system at once, so that resident
    memory is what is held.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--worker", f"{folder}/result", *words]
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(threads),
            **world,
        }
        if for_memory:
            shared |= {
                "MALLOC_MMAP_THRESHOLD_": "16384",
                "MALLOC_TRIM_THRESHOLD_": "0",
                "MALLOC_PERTURB_": "1",
            }
        running, errors = [], [Path(f"{folder}/errors.{rank}") for rank in range(processes)]
        for rank, path in enumerate(errors):
            with path.open("wb") as file:  # a pipe that nobody empties yet would stop a rank, and with it all
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(
                    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)
                )
        if any([process.wait() for process in running]):
            raise SystemExit("\n".join(path.read_text(errors="replace")[-2000:] for path in errors))
        return [json.loads(Path(f"{folder}/result.{rank}").read_text()) for rank in range(processes)]


def peak_memory(build: Callable[[], Any], run: Callable[[Any], Any]) -> int:
    """Bytes at the highest point of `run(build())`, beyond what there was before.

    On a GPU what PyTorch held, on a CPU resident memory (of a process that `launch` started `for_memory`). The
    profiler does not do here: it misses what the threads of gloo free.
    """
    import psutil
    import torch

    before = psutil.Process().memory_info().rss
    built = build()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run(built)
        return torch.cuda.max_memory_allocated()
    with PeakMemory() as memory:
        run(built)
    return memory.peak - before


class PeakMemory:
    """Largest resident memory of this process during a `with` block, in bytes, as the kernel counts it."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.peak = 0
        return self

    def __exit__(self, *_: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def small_llama(hidden: int, layers: int) -> Any:
    """Config of a Llama with heads of 64, three or four query heads to a key/value group, and a small vocabulary."""
    from transformers import LlamaConfig

    heads = hidden // 64
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 256) * 256,  # else a GPU's bf16 products are slow ones
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=next(heads // group for group in (3, 4, 2, 1) if heads % group == 0),
        use_cache=False,
        tie_word_embeddings=True,
    )
