"""What a run measured, phase by phase; it travels with every checkpoint and becomes `metrics.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.distributed import gather_objects
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.passes.pools import block_matrices
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.version import __version__


@dataclasses.dataclass
class Journal:
    """The numbers of a run.

    Attributes:
        run: what was run: model, task, world size, settings.
        phases: one entry for each point where quality was measured, in order.
        prunings: the prunings that were done, each with its step and settings.
        matrices: module name -> [zeros, entries] after the last pruning.
        seconds: time of each kind of work.
        sizes: bytes of adapter, masks and exported weights.
    """

    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    phases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prunings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    matrices: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.doing = "start"
        """What this rank is doing now, for messages; not one of the numbers."""
        self.started = False
        """Whether the first step has begun."""

    def phase(self, name: str) -> dict[str, Any] | None:
        """The entry of a phase, if it has been measured."""
        return next((entry for entry in self.phases if entry["phase"] == name), None)

    def add_phase(self, name: str, **values: Any) -> None:
        """Add a phase's entry; one of that name that a resumed run measures again replaces the old one."""
        self.phases = [entry for entry in self.phases if entry["phase"] != name]
        self.phases.append({"phase": name, **values})

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the time of the block to `seconds[work]`."""
        started, before = time.perf_counter(), self.doing
        self.doing = work if ", step" not in before else f"{work} after {before}"
        try:
            yield
            self.doing = before
        finally:
            self.seconds[work] = self.seconds.get(work, 0.0) + time.perf_counter() - started

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Take over the phases and times of an interrupted run; what this launch is stays."""
        self.phases = list(values.get("phases", []))
        self.prunings = list(values.get("prunings", []))
        self.matrices = dict(values.get("matrices", {}))
        for work, seconds in values.get("seconds", {}).items():
            self.seconds[work] = self.seconds.get(work, 0.0) + seconds


def describe_run(recipe: Recipe, args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """What is run, for `Journal.run`. Local, once the model has its adapters."""
    partition = open_partition(model)
    sizes = [(partition.shape(param).numel(), param.requires_grad) for param in model.parameters()]
    trained, total = sum(n for n, yes in sizes if yes), sum(n for n, _ in sizes)
    return {
        "dsee_scale": __version__,
        "model": recipe.model.name,
        "task": recipe.data.task,
        "length": recipe.data.max_length,
        "world_size": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "deepspeed": args.deepspeed_plugin is not None,
        "trainable_parameters": trained,
        "parameters": total,
        "trainable_share": trained / total,
        "dsee": recipe.dsee.to_dict(),
        "prune": [each.to_dict() for each in recipe.prune],
        "seed": args.seed,
    }


def metric_words(name: str, run: dict[str, Any]) -> str:
    """A metric's name for people: a perplexity says nothing without the length of its sequences."""
    return f"perplexity@{run['length']}" if name == "perplexity" else name


def to_jsonable(value: Any) -> Any:
    """JSON-able values: numbers that are not finite become None, tuples lists, other objects text."""
    if isinstance(value, dict):
        return {str(key): to_jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@torch.no_grad()
def count_zeros(model: nn.Module) -> dict[str, list[int]]:
    """Collective. Zeros and entries of every matrix of the blocks, experts' too, counted on the shards."""
    partition = open_partition(model)
    matrices = block_matrices(unwrap(model), partition.shape)
    shards = [matrix.shard(partition).data for matrix in matrices.values()]
    zeros = torch.tensor([shard.numel() - count_nonzero(shard) for shard in shards], device=partition.device)
    total = partition.sum_over_shards(zeros).tolist()
    return {
        name: [count, matrix.numel] for (name, matrix), count in zip(matrices.items(), total, strict=True)
    }


def sparsity(matrices: dict[str, list[int]]) -> float:
    """Fraction of all entries that is zero."""
    entries = sum(numel for _, numel in matrices.values())
    return sum(zeros for zeros, _ in matrices.values()) / entries if entries else 0.0


def reset_peak_memory() -> None:
    """Start a new measurement of this process's peak memory, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> list[int]:
    """Collective. Peak bytes of each rank since the reset: GPU memory where there is a GPU, else resident."""
    return gather_objects(_peak_bytes())


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
