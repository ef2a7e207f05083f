"""DeepSpeed's compiled operators, built once before any test starts processes that need them.

DeepSpeed compiles them at first use, under a lock file that stays behind if the process is killed; every
later process then waits for ever. So they are built here, in one process, and an old lock is removed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BUILD = """
from deepspeed.accelerator import get_accelerator
for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load(verbose=False)
"""
OLD = 300.0


def build_extensions() -> None:
    from torch.utils.cpp_extension import _get_build_directory

    for name in ("deepspeed_shm_comm", "cpu_adam"):
        lock = Path(_get_build_directory(name, verbose=False)) / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > OLD:
            lock.unlink()
    subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, timeout=600)


if __name__ == "__main__":
    build_extensions()
