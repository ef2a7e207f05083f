"""The start of a run: one run holds the output folder, and what can be wrong is found before the first step."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dsee_scale.checkpoint.adapter_file import KIND as ADAPTER
from dsee_scale.checkpoint.contents import check_output
from dsee_scale.checkpoint.tensors import TensorReader
from dsee_scale.distributed import from_rank0, raise_on_all_ranks, rank
from dsee_scale.errors import ConfigError, DSEEError
from dsee_scale.export.export import BASE_FOLDER, LiveModel, reject_unknown_quantisation
from dsee_scale.export.plan import WEIGHTS_FILE, base_files
from dsee_scale.export.report import INDEX_FILE
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.export.writer import WITHOUT_UPDATE
from dsee_scale.partition import open_partition
from dsee_scale.passes.batches import learned_positions
from dsee_scale.pruning.checks import check_in_order
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.recipe.sections import DataConfig
from dsee_scale.training.journal import Journal
from dsee_scale.training.timeline import Timeline

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
RECIPE_MARK = "# Written by dsee-scale run: the recipe with its flags, as it ran.\n"
ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
LOCK_FILE = ".dsee_run.json"
HEARTBEAT = 30.0
"""Seconds between two signs of life; they count between machines, which cannot see each other's processes."""
SILENCE = 10 * HEARTBEAT
"""After so many seconds without one, a run on another machine is gone."""
LOOK = 5.0
"""Seconds between two looks at such a run, while it can't be told."""


@contextlib.contextmanager
def explained_start(journal: Journal) -> Iterator[None]:
    """Local. Whatever ends a run before its first step becomes a ConfigError of one line.

    Libraries meet a wrong setting or file in their own ways, deep inside; to whoever started the run each is the same:
    something must be changed first. What comes later, and is none of our errors, is left as it is.
    """
    try:
        yield
    except DSEEError:
        raise
    except Exception as error:
        if journal.started:
            raise
        reason = " ".join(str(error).split())[:600] or "no reason given"
        raise ConfigError(
            f"the run cannot start: {journal.doing}: {type(error).__name__}: {reason}"
        ) from error


def check_fresh(output: Path) -> None:
    """Refuse an output folder that holds more than a start that failed leaves behind. Local.

    Raises:
        ConfigError: naming what is there.
    """
    ours = {LOCK_FILE}
    if _is_recipe_of_ours(output / RECIPE_FILE):
        ours.add(RECIPE_FILE)
    with contextlib.suppress(ConfigError):
        check_output(output / BASE_FOLDER, EXPORT, overwrite=True)
        ours.add(BASE_FOLDER)
    found = sorted(path.name for path in output.iterdir() if path.name not in ours) if output.exists() else []
    if found:
        raise ConfigError(
            f"output folder {output} is not empty ({', '.join(found[:5])}); choose another training.output_dir, or "
            "--resume"
        )


def check_results(output: Path) -> None:
    """Refuse to start a run whose results would take the place of something else. Local.

    Raises:
        ConfigError: naming it.
    """
    if (output / RECIPE_FILE).exists() and not _is_recipe_of_ours(output / RECIPE_FILE):
        raise ConfigError(f"{output / RECIPE_FILE} was not written by a run, which would replace it; move it")
    for name, kind in ((ADAPTER_FOLDER, ADAPTER), (MODEL_FOLDER, EXPORT), (BASE_FOLDER, EXPORT)):
        check_output(output / name, kind, overwrite=True)


def check_weights(name: str) -> None:
    """Refuse a model folder whose weight files are missing, cut short or elsewhere. Local.

    Under ZeRO-3 one rank reads them, and would leave the others waiting.

    Raises:
        FormatError: naming the file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if any((folder / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE)):
        TensorReader(base_files(folder))
    elif not any(folder.glob("pytorch_model*.bin")):
        base_files(folder)


def _check_lengths(model: nn.Module, data: DataConfig) -> None:
    """Refuse examples that may be longer than a model with learned positions takes. Local."""
    most, _ = learned_positions(model)
    answer = int(data.generation.get("max_new_tokens", 0)) if data.generate_samples else 0
    if most is not None and data.max_length + answer > most:
        beside = f" and data.generation.max_new_tokens {answer}" if answer else ""
        raise ConfigError(
            f"data.max_length is {data.max_length}{beside}, and {type(model).__name__} has positions for {most} tokens:"
            f" set data.max_length to at most {most - answer}"
        )


def check_plan(
    model: nn.Module, recipe: Recipe, timeline: Timeline, done: Sequence[Mapping[str, Any]], tokenizer: Any
) -> None:
    """Collective. Refuse data, a pruning or an export that don't fit, as soon as the model has its adapters.

    Args:
        model: the raw model.
        recipe: the run's.
        timeline: when what is pruned.
        done: the prunings that the checkpoint has done, from the journal.
        tokenizer: exported along.

    Raises:
        TargetError, ConfigError: what `prune` and `export_model` would say later.
    """
    partition = open_partition(model)
    with raise_on_all_ranks(partition, what="checking what will be pruned and exported"):
        _check_lengths(model, recipe.data)
        for event in timeline.prune_events:
            if event.to_dict() in done:
                continue
            check_in_order(model, event.configs)
        if recipe.export is not None:
            reject_unknown_quantisation(model, partition)
            cut = recipe.export.delta not in WITHOUT_UPDATE
            LiveModel(model, partition, "2GB", cut=cut, tokenizer=tokenizer)


def _is_recipe_of_ours(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return file.read(len(RECIPE_MARK)) == RECIPE_MARK.encode()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Collective. Hold a run's output folder, made if need be; a folder that is left empty goes again.

    Where a run on another machine was in it a moment ago, wait until it is known to live or not: SILENCE at most.

    Raises:
        ConfigError: another run is in it (its host, process and start are named), or it cannot be written to.
    """
    made = taken = False
    watch = _Watch(output / LOCK_FILE)
    while not taken:
        with raise_on_all_ranks(what=f"preparing the output folder {output}"):
            if rank() == 0:
                made = made or not output.exists()
                output.mkdir(parents=True, exist_ok=True)
                taken = watch.is_free()
                if taken:
                    _take(output / LOCK_FILE)
        # Again and again: in one collective the others would wait no longer than ddp_timeout, which may be shorter.
        taken = from_rank0(taken)
        if not taken:
            time.sleep(LOOK)
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


class _Watch:
    """Whether a lock can be taken. Local, on rank 0.

    A process of this machine is alive or not. One of another machine or container shows by its next sign of life that
    it is, by none for SILENCE that it is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._began = path, time.monotonic()
        self._seen: tuple[dict[str, Any], int] | None = None

    def is_free(self) -> bool:
        """True: no one holds it; False: that can't be told yet.

        Raises:
            ConfigError: another run holds it.
        """
        holder = read_holder(self._path)
        if holder is None:
            return True
        if _sees(holder) and isinstance(holder.get("pid"), int):
            if _is_alive(holder):
                raise _held(self._path, holder)
            return True
        try:
            last, silent = self._path.stat().st_mtime_ns, _silence(self._path)
        except FileNotFoundError:
            return True
        if self._seen not in (None, (holder, last)):
            raise _held(self._path, holder)
        if silent >= SILENCE or time.monotonic() - self._began >= SILENCE:
            return True
        if self._seen is None:
            logger.warning(
                "process %s on %s was in output folder %s %.0f s ago; waiting for its next sign of life: after %.0f s "
                "without one it is gone",
                holder.get("pid"),
                holder.get("host"),
                self._path.parent,
                silent,
                SILENCE,
            )
        self._seen = holder, last
        return False


def _held(path: Path, holder: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"another run is in output folder {path.parent}: process {holder.get('pid')} on {holder.get('host')}, "
        f"since {holder.get('since')}. Choose another training.output_dir, or wait for it; if it is gone, "
        f"delete {path}"
    )


def _take(path: Path) -> None:
    """Write the lock by a rename of its own: of two that do so at once the later one holds it."""
    replaces = path.exists()
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(json.dumps(_self() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
    os.replace(own, path)
    if replaces:
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
    own = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    return own | {"machine": _machine()}


def _machine() -> str:
    """A mark that processes share which see each other: those of one container, whatever its host is called."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _sees(holder: Mapping[str, Any]) -> bool:
    """Whether this process would see a lock's holder; those of older versions give the host's name alone."""
    own = _machine()
    if own and holder.get("machine"):
        return bool(holder["machine"] == own)
    return bool(holder.get("host") == socket.gethostname())


def process_start(pid: int) -> str:
    """A mark by which a process is told from a later one of its number; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine is still there."""
    return holder["pid"] != os.getpid() and process_start(holder["pid"]) == holder.get("start") != ""


def _silence(path: Path) -> float:
    """Seconds since a lock's last sign of life, by the clock of the storage, not of this machine."""
    probe = path.with_name(f"{path.name}.{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - path.stat().st_mtime


def _show_life(path: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
