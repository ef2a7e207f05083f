"""A plan as text: the table, whether it fits, and what to choose."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsee_scale.config import PruneConfig
from dsee_scale.planning.plan import GIB, RESERVED, Memory, Plan, make_plan


def fits(plan: Plan, gpu_memory: float) -> bool:
    """Whether every phase stays below what a GPU of `gpu_memory` bytes leaves free."""
    return plan.peak.gpu <= gpu_memory * (1 - RESERVED)


def plan_text(plan: Plan, gpu_memory: float) -> str:
    """The plan for people.

    Args:
        plan: the figures.
        gpu_memory: bytes of one GPU.
    """
    shape, setting = plan.shape, plan.setting
    base = setting.quantize or "bf16"
    where = ", parameters and optimizer on the host" if setting.offload else ""
    experts = (
        f" of {shape.experts_of_a_layer} experts, {shape.chosen} for a token"
        if shape.experts_of_a_layer
        else ""
    )
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:,.2f} billion parameters in {shape.layers} blocks{experts}, {base} "
        f"base{where}",
        f"{setting.gpus} GPUs of {gpu_memory / GIB:.0f} GiB, {setting.batch} x {setting.length} tokens on each, "
        f"{plan.trainable:,} trained ({100 * plan.trainable / shape.parameters:.3f}%)",
        "",
        f"{'phase':<12} {'GPU memory':>12} {'host, per GPU':>14}",
    ]
    lines += [f"{name:<12} {_gib(m.gpu):>12} {_gib(m.host):>14}" for name, m in plan.phases.items()]
    lines += [
        "",
        f"traffic of a training step     {_gib(plan.traffic)} received by each GPU",
        f"checkpoint, export             {_gib(plan.checkpoint)}, {_gib(plan.export)}",
        f"decomposition                  {_time(plan.decomposition)} on one CPU core for each GPU",
        "",
        *advice(plan, gpu_memory),
    ]
    return "\n".join(lines)


def plan_dict(plan: Plan, gpu_memory: float) -> dict[str, Any]:
    """The plan as plain values, in bytes and seconds."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.parameters,
        "experts": plan.shape.experts_of_a_layer,
        "experts_per_token": plan.shape.chosen,
        "trainable": plan.trainable,
        **dataclasses.asdict(plan.setting),
        "gpu_memory": gpu_memory,
        "phases": {name: dataclasses.asdict(memory) for name, memory in plan.phases.items()},
        "traffic": plan.traffic,
        "checkpoint": plan.checkpoint,
        "export": plan.export,
        "decomposition_seconds": plan.decomposition,
        "fits": fits(plan, gpu_memory),
        "advice": advice(plan, gpu_memory),
    }


def advice(plan: Plan, gpu_memory: float) -> list[str]:
    """What to choose, one sentence each."""
    name, worst = max(plan.phases.items(), key=lambda item: item[1].gpu)
    if fits(plan, gpu_memory):
        found = [f"It fits: the largest phase, {name}, leaves {_gib(gpu_memory - worst.gpu)} of a GPU."]
        if plan.setting.quantize or plan.setting.offload:
            found += _simpler(plan, gpu_memory)
        return found + _notes(plan)
    found = [
        f"It does not fit: {name} needs {_gib(worst.gpu)} of {_gib(gpu_memory)} "
        f"({100 * RESERVED:.0f}% are left to CUDA and fragmentation)."
    ]
    ways = [text for text, changes in _ways(plan) if fits(_with(plan, **changes), gpu_memory)]
    enough = _enough_gpus(plan, gpu_memory)
    if enough:
        ways.append(f"{enough} GPUs")
    found.append(
        f"It would fit with: {'; or '.join(ways)}."
        if ways
        else "Shorter sequences or larger GPUs are needed."
    )
    return found + _notes(plan)


def _simpler(plan: Plan, gpu_memory: float) -> list[str]:
    plain = _with(plan, quantize=None, offload=False)
    if fits(plain, gpu_memory):
        return [
            "So does bf16 without offload: choose that, it is faster, and its supports and export are those of the "
            "weights themselves."
        ]
    return []


def _ways(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    ways: list[tuple[str, dict[str, Any]]] = [
        ("activation checkpointing", {"checkpointing": True}),
        ("--quantize int8", {"quantize": "int8"}),
        ("--quantize nf4", {"quantize": "nf4"}),
        ("--offload", {"offload": True}),
        ("--quantize nf4 --offload", {"quantize": "nf4", "offload": True}),
    ]
    return [way for way in ways if any(getattr(plan.setting, key) != value for key, value in way[1].items())]


def _enough_gpus(plan: Plan, gpu_memory: float) -> int | None:
    gpus = plan.setting.gpus
    while gpus < 4096:
        gpus *= 2
        if fits(_with(plan, gpus=gpus), gpu_memory):
            return gpus
    return None


def _notes(plan: Plan) -> list[str]:
    gram = _gib(PruneConfig.gram_memory_mib * 2**20)
    found = [
        f"prune is without a re-fit, which is the default: that takes up to {gram} "
        "(prune.gram_memory_mib) more, a block's weights and its inputs for all calibration batches, and before that a "
        "training step's memory (docs/memory.md)."
    ]
    if plan.setting.quantize:
        found.append(
            "A quantised base is loaded whole on every GPU, before it is partitioned: more GPUs do not make that "
            "phase smaller."
        )
    if plan.setting.quantize in ("nf4", "fp4"):
        found.append("Supports found in four bits differ from those of bf16 (docs/memory.md).")
    host: Memory = plan.peak
    if host.host > GIB:
        found.append(f"Hosts need {_gib(host.host)} for each of their GPUs.")
    return found


def _with(plan: Plan, **changes: Any) -> Plan:
    return make_plan(plan.shape, dataclasses.replace(plan.setting, **changes))


def _gib(size: float) -> str:
    if size < 0.1 * GIB:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / GIB:.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
