"""The figure of benchmarks/quality.py: where each row stands after every phase."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from _quality_jobs import METRIC, METRIC_WORDS

FAR = 1.2
"""A loss beyond so many times the worst exported one is written at the edge."""
PHASES = {"tuned": "o", "pruned": "v", "retuned": "^", "exported": "s"}
COLOURS = {"tuned": "#9aa0a6", "pruned": "#d1495b", "retuned": "#edae49", "exported": "#00798c"}


def kept_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Row -> the finished cells of its seeds, of one job's folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("cells/*.json")):
        found.setdefault(path.stem.rsplit(", seed ", 1)[0], []).append(json.loads(path.read_text()))
    return found


def save_plot(output: Path, path: Path) -> None:
    """One panel a job with a marker for each phase of a row, means over seeds.

    Args:
        output: where the script keeps its cells, a folder for each job.
        path: PNG or SVG file to write.
    """
    from matplotlib.figure import Figure

    jobs = {job: cells for job in METRIC if (cells := kept_cells(output / job))}
    height = 0.8 + 0.32 * max(map(len, jobs.values()))
    figure = Figure(figsize=(5.2 * len(jobs), height), layout="constrained")
    panels = figure.subplots(1, len(jobs), squeeze=False)[0]
    for axes, (job, cells) in zip(panels, jobs.items(), strict=True):
        better = max if METRIC[job] == "accuracy" else min
        rows = sorted(cells, key=lambda row: better(1, -1) * _mean(cells[row], "exported", METRIC[job]))
        worst = _mean(cells[rows[-1]], "exported", METRIC[job])
        edge = math.inf if better is max else FAR * worst
        for place, row in enumerate(rows):
            for phase, marker in PHASES.items():
                if all(phase in one for one in cells[row]):
                    value = _mean(cells[row], phase, METRIC[job])
                    if value > edge:  # would press all others into one line
                        axes.text(
                            edge,
                            place,
                            f"{value:.2f} \N{RIGHTWARDS ARROW}",
                            color=COLOURS[phase],
                            ha="right",
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
