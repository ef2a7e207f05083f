"""The cells of benchmarks/quality.py as tables and a figure: where each row stands after every phase."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from _quality_jobs import METRIC, METRIC_WORDS

UNTUNED = "untuned"
FAR = 1.2
"""A loss beyond so many times the worst exported one is written at the edge."""
PHASES = {"tuned": "o", "pruned": "v", "retuned": "^", "exported": "s"}
COLOURS = {"tuned": "#9aa0a6", "pruned": "#d1495b", "retuned": "#edae49", "exported": "#00798c"}


def kept_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Row -> the finished cells of its seeds, of one job's folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(path.stem.rsplit(", seed ", 1)[0], []).append(json.loads(path.read_text()))
    return found


def print_tables(folder: Path) -> None:
    """A page with the tables of all jobs that have finished cells, the best row first."""
    print("# Quality, every row and column\n")
    print(
        "Printed by `benchmarks/quality.py --plot`; [Benchmarks](benchmarks.md) says what was asked and what was found."
    )
    print(
        "Rows are sorted by what is exported. Minutes are those of one core of a CPU, often beside other work."
    )
    for job in METRIC:
        if cells := kept_cells(folder / job):
            print(f"\n## {job}\n")
            print_table(job, {row: cells[row] for row in _sorted(job, cells)})


def print_table(job: str, cells: dict[str, list[dict[str, Any]]]) -> None:
    """One Markdown row for each row of the benchmark, means over seeds with their spread."""
    metrics = [name for name in {METRIC[job], "loss", "bleu"} if _has(cells, name)]
    metrics.sort(key=lambda name: (name != METRIC[job], name))
    phases = ("tuned", "pruned", "merged densely", "retuned", "exported")
    columns = [f"{phase}, {name}" for name in metrics for phase in phases if _has(cells, name, phase)]
    print(f"| {job}, {METRIC_WORDS[job]} first | {' | '.join(columns)} | zeros | trained | seeds | minutes |")
    print("| --- |" + " ---: |" * (len(columns) + 4))
    for row, found in cells.items():
        values = [
            _spread([one[phase][name] for one in found if name in one.get(phase, {})])
            for phase, name in (column.split(", ") for column in columns)
        ]
        minutes = _spread([one["seconds"] / 60 for one in found if "seconds" in one], digits=0)
        rest = [
            f"{100 * found[0]['zeros']:.2f}%",
            f"{100 * found[0]['trained_share']:.2f}%",
            len(found),
            minutes,
        ]
        print(f"| {row} | {' | '.join(map(str, values + rest))} |")


def _has(cells: dict[str, list[dict[str, Any]]], metric: str, *phases: str) -> bool:
    return any(
        metric in one.get(phase, {})
        for found in cells.values()
        for one in found
        for phase in phases or PHASES
    )


def _spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _sorted(job: str, cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Rows, the best exported one first."""
    sign = -1 if METRIC[job] == "accuracy" else 1
    return sorted(cells, key=lambda row: sign * _mean(cells[row], "exported", METRIC[job]))


def save_plot(folder: Path, path: Path) -> None:
    """One panel a job with a marker for each phase of a row, means over seeds.

    Args:
        folder: the finished cells, a folder for each job.
        path: PNG or SVG file to write.
    """
    from matplotlib.figure import Figure

    jobs = {job: cells for job in METRIC if (cells := kept_cells(folder / job))}
    for cells in jobs.values():
        cells.pop(UNTUNED, None)  # too far from all others
    height = 0.8 + 0.32 * max(map(len, jobs.values()))
    figure = Figure(figsize=(5.2 * len(jobs), height), layout="constrained")
    panels = figure.subplots(1, len(jobs), squeeze=False)[0]
    for axes, (job, cells) in zip(panels, jobs.items(), strict=True):
        rows = _sorted(job, cells)[::-1]
        worst = _mean(cells[rows[0]], "exported", METRIC[job])
        edge = math.inf if METRIC[job] == "accuracy" else FAR * worst
        for place, row in enumerate(rows):
            for phase, marker in PHASES.items():
                if all(phase in one for one in cells[row]):
                    value = _mean(cells[row], phase, METRIC[job])
                    if value > edge:  # would press all others into one line
                        axes.text(
                            1.02,
                            place,
                            f"\N{RIGHTWARDS ARROW} {value:.2f}",
                            transform=axes.get_yaxis_transform(),
                            color=COLOURS[phase],
                            va="center",
                        )
                        continue
                    axes.plot(value, place, marker, color=COLOURS[phase], label=phase if place == 0 else None)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel(f"{job}: {METRIC_WORDS[job]}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _mean(cells: list[dict[str, Any]], phase: str, metric: str) -> float:
    return statistics.mean(one[phase][metric] for one in cells)
