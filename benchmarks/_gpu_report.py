"""Lines of a GPU's benchmarks: what was measured, its floor, its goal, and whether that is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _floors import step_floors
from _report import Report


@dataclass(frozen=True)
class Goal:
    """A bound on one key of a line, e.g. at most 0.5 for "ratio"."""

    key: str
    bound: float
    at_least: bool = False

    def met(self, line: dict[str, Any]) -> bool:
        value: float = line[self.key]
        return value >= self.bound if self.at_least else value <= self.bound


GOALS = {
    "added": Goal("ratio", 0.5),
    "masked step": Goal("ratio", 1.35),
    "residual": Goal("ratio", 0.05),
    "mask bandwidth": Goal("of_floor", 0.4, at_least=True),
    "prune": Goal("ours", 2),
    "supports": Goal("ours", 20),
    "memory": Goal("measured_over_plan", 1.15),
}


class GpuReport(Report):
    """JSON lines."""

    def __init__(self, benchmark: str, **always: Any) -> None:
        super().__init__(benchmark, as_json=True, **always)

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
        """One line; with a goal also the key it is about, its bound, and whether it is met."""
        if goal is not None:
            line = {"ours": ours, "ratio": ours / peer if peer else float("nan"), **details}
            sign = ">=" if goal.at_least else "<="
            details |= {"goal": f"{goal.key} {sign} {goal.bound:g}", "met": goal.met(line)}
        super().add(case, metric, unit, ours, peer, **details)

    def timed(
        self, case: str, metric: str, seconds: float, bound: float, peer: float | None = None, **details: Any
    ) -> None:
        """One line: seconds, the floor, and the fraction of it that is reached."""
        self.add(case, metric, "s", seconds, peer, floor=bound, of_floor=bound / seconds, **details)


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
    """Lines of checkpointed steps: frozen, ours, what ours adds, and ours under the mask, against PEFT's."""
    floors, frozen, peft = step_floors(config, targets, rank, sequences, length), took["frozen"], took["peft"]
    report.timed(case, "frozen step", frozen, floors["frozen"])
    report.timed(case, "step", took["ours"], floors["ours"], peft, frozen=frozen)
    ours, goal = took["ours"] - frozen, GOALS["added"]
    report.timed(case, "added over frozen", ours, floors["added"], peft - frozen, goal=goal)
    case, goal = f"{case}, under the mask", GOALS["masked step"]
    report.timed(case, "step", took["masked"], floors["masked"], peft, goal=goal)
