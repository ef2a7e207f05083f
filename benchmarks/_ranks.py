"""Run a benchmark's own file once per rank, and read back what the ranks wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def launch(script: str, words: Sequence[str], processes: int, threads: int) -> list[Any]:
    """Start `script --worker FILE WORDS` on every rank; the JSON that each wrote to `FILE.RANK`."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        command = [sys.executable, script, "--worker", f"{folder}/result", *words]
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads), **world}
        running = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for rank in range(processes)
        ]
        errors = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit("\n".join(error.decode()[-2000:] for error in errors))
        return [json.loads(Path(f"{folder}/result.{rank}").read_text()) for rank in range(processes)]
