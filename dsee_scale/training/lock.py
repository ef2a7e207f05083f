"""One run at a time in an output folder: a file that says who is in it, and that a dead run's file is no lock."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsee_scale.distributed import raise_on_all_ranks, rank
from dsee_scale.errors import ConfigError

LOCK_FILE = ".dsee_run.json"
HEARTBEAT = 30.0
"""Seconds between two signs of life; they count between machines, which cannot see each other's processes."""
SILENCE = 10 * HEARTBEAT


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Collective. Hold a run's output folder, made if need be; a folder that is left empty goes again.

    Raises:
        ConfigError: another run is in it (its host, process and start are named), or it cannot be written to.
    """
    made = False
    with raise_on_all_ranks(what=f"preparing the output folder {output}"):
        if rank() == 0:
            made = not output.exists()
            output.mkdir(parents=True, exist_ok=True)
            _take(output / LOCK_FILE)
    over = threading.Event()
    alive = threading.Thread(target=_show_life, args=(output / LOCK_FILE, over), daemon=True)
    if rank() == 0:
        alive.start()
    try:
        yield
    finally:
        over.set()
        if rank() == 0:
            alive.join()
            with contextlib.suppress(OSError):
                (output / LOCK_FILE).unlink()
                if made:
                    output.rmdir()


def _take(path: Path) -> None:
    """Write the lock by a rename of its own: of two that do so at once the later one holds it."""
    holder = read_holder(path)
    if holder is not None and _is_alive(holder, path):
        raise ConfigError(
            f"another run is in output folder {path.parent}: process {holder.get('pid')} on {holder.get('host')}, "
            f"since {holder.get('since')}. Choose another training.output_dir, or wait for it; if it is gone, "
            f"delete {path}"
        )
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(json.dumps(_self() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
    os.replace(own, path)
    if holder is not None:
        time.sleep(0.2)  # someone else may have found the same dead lock
    found = read_holder(path)
    if found is None or not _self().items() <= found.items():
        raise ConfigError(f"another run took output folder {path.parent} at the same moment: {found}")


def read_holder(path: Path) -> dict[str, Any] | None:
    """Who wrote a lock; None for no lock, or none that can be read. Local."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _self() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}


def process_start(pid: int) -> str:
    """A mark by which a process is told from a later one of its number; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def _is_alive(holder: dict[str, Any], path: Path) -> bool:
    if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
        return holder["pid"] != os.getpid() and process_start(holder["pid"]) == holder.get("start") != ""
    probe = path.with_name(f"{path.name}.{os.getpid()}")
    probe.touch()  # the clock of the storage, not of this machine
    silent = probe.stat().st_mtime - path.stat().st_mtime
    probe.unlink()
    return silent < SILENCE


def _show_life(path: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
