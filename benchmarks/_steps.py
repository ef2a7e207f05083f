"""What benchmarks of training steps share: a DeepSpeed config, one step, rounds of all sides in turn, their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def zero3_config(batch: int, dtype: torch.dtype, **zero: Any) -> dict[str, Any]:
    """ZeRO-3 with torch's AdamW; `batch` sequences a rank."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": 3, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def step(engine: Any, tokens: torch.Tensor) -> float:
    """Forward, backward and the optimizer's step; the loss."""
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def time_rounds(
    engines: Mapping[str, Any], tokens: torch.Tensor, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of every side's step, round after round.

    The order turns, so that no side always runs after the same one.
    """
    sides = list(engines)
    found: dict[str, dict[str, list[float]]] = {
        metric: {side: [] for side in sides} for metric in ("wall", "cpu")
    }
    for k in range(rounds):
        turn = k % len(sides)
        for side in sides[turn:] + sides[:turn]:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            step(engines[side], tokens)
            found["wall"][side].append(time.perf_counter() - start)
            found["cpu"][side].append(time.process_time() - start_cpu)
    return found


def slowest_ranks(ranks: Sequence[Mapping[str, Mapping[str, list[float]]]], metric: str) -> dict[str, float]:
    """By side: the median over the rounds of what the slowest rank took."""
    return {
        side: statistics.median(
            max(times) for times in zip(*(rank[metric][side] for rank in ranks), strict=True)
        )
        for side in ranks[0][metric]
    }
