"""What a GPU's benchmarks measure and say: times, and lines with the floor, the goal, and whether that is met."""

from __future__ import annotations

import gc
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _floors import step_floors
from _report import Report, median_seconds_each

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Goal:
    """Bounds on one key of a line, e.g. at most 0.5 for "ratio"."""

    key: str
    most: float = math.inf
    least: float = -math.inf

    def met(self, value: float | None) -> bool | None:
        """None where there is no value, e.g. no ratio to a peer that is not above 0."""
        return None if value is None else self.least <= value <= self.most

    def __str__(self) -> str:
        least = f"{self.least:g} <= " if self.least > -math.inf else ""
        return f"{least}{self.key}" + (f" <= {self.most:g}" if self.most < math.inf else "")


GOALS = {
    "added": Goal("ratio", 0.5),
    "masked step": Goal("ratio", 1.35),
    "residual": Goal("ratio", 0.05),
    "mask bandwidth": Goal("of_floor", least=0.4),
    "prune": Goal("ours", 2),
    "supports": Goal("ours", 20),
    "memory": Goal("measured_over_plan", 1.15, least=0.85),
}


class GpuReport(Report):
    """JSON lines; `failed` once a part did."""

    def __init__(self, benchmark: str, **always: Any) -> None:
        super().__init__(benchmark, as_json=True, **always)
        self.failed = False

    def add(
        self,
        case: str,
        metric: str,
        unit: str,
        ours: float,
        peer: float | None = None,
        *,
        goal: Goal | None = None,
        **details: Any,
    ) -> None:
        """One line; with a goal also its bounds, the value of the key that it is about, and whether it is met."""
        ratio = ours / peer if peer is not None and peer > 0 else None
        if peer is not None and ratio is None:
            details |= {"ratio": None, "note": "no ratio, as the peer's is not above 0"}
        if goal is not None:
            value = {"ours": ours, "ratio": ratio, **details}[goal.key]
            details |= {"goal": str(goal), "value": value, "met": goal.met(value)}
        super().add(case, metric, unit, ours, peer, **details)

    def timed(
        self, case: str, metric: str, seconds: float, bound: float, peer: float | None = None, **details: Any
    ) -> None:
        """One line: seconds, the floor, and the fraction of it that is reached, null for a difference below 0."""
        of_floor = bound / seconds if seconds > 0 else None
        self.add(case, metric, "s", seconds, peer, floor=bound, of_floor=of_floor, **details)

    def say(self, case: str, outcome: str) -> None:
        """One line of what was not measured."""
        line = {"benchmark": self.benchmark, "case": case, "outcome": outcome}
        print(json.dumps(line | self.always), flush=True)

    def attempt(self, case: str, run: Callable[..., Any], *words: Any) -> None:
        """Run a part of a case; an error is said in a line of its own. Then what it held on the GPU is free again."""
        try:
            run(*words)
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.say(case, f"failed: {type(error).__name__}: {first}")
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


def seconds(*runs: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> list[float]:
    """Median time of each call, until the device is done with it; the calls in turn, so that all see the same card."""

    def wait() -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    def until_done(run: Callable[[], Any]) -> None:
        run()
        wait()

    wait()
    return median_seconds_each(*(partial(until_done, run) for run in runs), repeats=repeats, warmup=warm_up)


def report_step(
    report: GpuReport,
    case: str,
    took: Mapping[str, float],
    config: Any,
    targets: Sequence[str],
    rank: int,
    sequences: int,
    length: int,
) -> None:
    """Lines of checkpointed steps: frozen, ours, what ours adds, and ours under the mask if any, against PEFT's."""
    floors, frozen, peft = step_floors(config, targets, rank, sequences, length), took["frozen"], took["peft"]
    cut: dict[str, Any] = {"blocks": config.num_hidden_layers}
    report.timed(case, "frozen step", frozen, floors["frozen"], **cut)
    report.timed(case, "step", took["ours"], floors["ours"], peft, frozen=frozen, **cut)
    ours, goal = took["ours"] - frozen, GOALS["added"]
    report.timed(case, "added over frozen", ours, floors["added"], peft - frozen, goal=goal, **cut)
    if "masked" in took:
        case, goal = f"{case}, under the mask", GOALS["masked step"]
        report.timed(case, "step", took["masked"], floors["masked"], peft, goal=goal, **cut)
