"""DeepSpeed's compiled operators, built once before any test starts processes that need them.

DeepSpeed compiles them at first use, under a lock file that stays behind if the process is killed; every
later process then waits for ever. It also compiles them anew whenever another interpreter or another ninja
used the same cache. So they are built here, by one process at a time, with this environment's ninja, into a
cache that belongs to this environment alone.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

BUILD = """
from deepspeed.accelerator import get_accelerator
for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load(verbose=False)
"""
_IN_USE: list[IO[str]] = []
"""Held until this process ends, so that no other test run takes our processes' lock files for leftovers."""


def build_extensions() -> None:
    """Build what is missing; sets `TORCH_EXTENSIONS_DIR` and `PATH` for this process and those that it starts.

    Raises:
        RuntimeError: the compiler failed; holds the end of its output.
    """
    default = Path(sys.prefix) / "torch_extensions"
    cache = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    cache.mkdir(parents=True, exist_ok=True)
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    file = open(cache / "in_use", "w")  # noqa: SIM115 (stays open)
    _IN_USE.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # others use the operators right now: a lock file may be one of theirs
        fcntl.flock(file, fcntl.LOCK_SH)
    else:
        for lock in cache.glob("*/lock"):  # of a build that was killed
            lock.unlink()
    _build()
    fcntl.flock(file, fcntl.LOCK_SH)


def _build() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"DeepSpeed's operators could not be built:\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    build_extensions()
