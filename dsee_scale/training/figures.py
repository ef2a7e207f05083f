"""The report's pictures: loss over steps, quality at each phase, zeros in each matrix, sizes of files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

from dsee_scale.errors import ConfigError

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
MAIN, SECOND, ACCENT = "#2f6f9f", "#9fb8cc", "#d9822b"
WIDE, HALF = 10.0, 5.0


def loss_curve(metrics: dict[str, Any]) -> str:
    """Training loss over steps, with the learning rate below it and a line where pruning is complete."""
    points = [
        (entry["step"], entry["loss"]) for entry in metrics["training"] if entry.get("loss") is not None
    ]
    rates = [
        (e["step"], e["learning_rate"]) for e in metrics["training"] if e.get("learning_rate") is not None
    ]
    if not points:
        return "<p>No step was logged: set training.logging_steps below the number of steps.</p>"
    figure = _figure(WIDE, 3.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    pruned = next((entry for entry in metrics["phases"] if entry["phase"] == "pruned"), None)
    cut = pruned["step"] if pruned is not None else points[-1][0]
    for part in ([p for p in points if p[0] <= cut], [p for p in points if p[0] > cut]):
        if part:
            top.plot(*zip(*part, strict=True), color=MAIN, alpha=0.35, linewidth=1)
            top.plot(*zip(*_smooth(part), strict=True), color=MAIN, linewidth=2)
    top.set_ylabel("training loss")
    low, high = min(value for _, value in points), max(value for _, value in points)
    top.set_ylim(0 if low < high / 2 else None, None)
    bottom.plot(*zip(*rates, strict=True), color=SECOND, linewidth=1.5)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if pruned is not None:
        for axis in (top, bottom):
            axis.axvline(pruned["step"], color=ACCENT, linewidth=1.2, linestyle=(0, (4, 3)))
        label = f"{100 * pruned['sparsity']:.0f}% of the block weights removed"
        top.annotate(
            label, (pruned["step"], 0.93), xycoords=("data", "axes fraction"), xytext=(6, 0),
            textcoords="offset points", color=ACCENT, fontsize=9, va="top",
        )  # fmt: skip
    return _svg(figure, (top, bottom), "Training loss and learning rate over the optimizer steps")


def quality_bars(phases: list[tuple[str, float]], metric: str) -> str:
    """One bar per phase, the first and the pruned one in colours of their own."""
    return _svg(_quality_figure(phases), (), f"{metric} at each phase")


def quality_picture(phases: list[tuple[str, float]]) -> bytes:
    """The same as a PNG file."""
    buffer = io.BytesIO()
    _quality_figure(phases).savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _quality_figure(phases: list[tuple[str, float]]) -> Any:
    colors = [SECOND, *(ACCENT if name == "pruned" else MAIN for name, _ in phases[1:])]
    figure, axis = _bars([(name, value, _number(value)) for name, value in phases], colors)
    axis.invert_yaxis()
    axis.set_xlim(0, max((value for _, value in phases), default=0) * 1.14 or 1)
    return figure


def sparsity_map(matrices: dict[str, list[int]]) -> str:
    """Fraction of zeros of every kind of pruned matrix, one row each, in every block, one column each."""
    cells = zero_shares(matrices)
    if not cells:
        return ""
    columns = sorted({index for row in cells.values() for index in row})
    grid = [[row.get(index, float("nan")) for index in columns] for row in cells.values()]
    figure = _figure(WIDE, 0.9 + 0.28 * len(cells))
    axis = figure.subplots()
    image = axis.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axis.set_yticks([i + 0.5 for i in range(len(cells))], list(cells))
    every = max(1, len(columns) // 10)
    axis.set_xticks([i + 0.5 for i in range(0, len(columns), every)], [str(c) for c in columns[::every]])
    axis.invert_yaxis()
    axis.set_xlabel("block")
    bar = figure.colorbar(image, ax=axis, pad=0.015, aspect=12, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"])
    bar.outline.set_visible(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return _svg(figure, (), "Share of zeros in each matrix")


def zero_shares(matrices: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Kind of matrix -> block -> fraction of zeros, experts of a block together.

    A kind is the last part of a name; where it stands twice in a block (GPT-2's `attn.c_proj` and `mlp.c_proj`), the
    last two, or as many as it takes.
    """
    counts: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for name, (zeros, entries) in matrices.items():
        block = re.search(r"\.(\d+)\.", name)
        within = tuple(part for part in name[block.end() if block else 0 :].split(".") if not part.isdigit())
        found = counts.setdefault(within, {}).setdefault(int(block.group(1)) if block else 0, [0, 0])
        found[0] += zeros
        found[1] += entries
    shares: dict[str, dict[int, float]] = {}
    for within, blocks in counts.items():
        parts = next(
            n for n in range(1, len(within) + 1) if _is_alone(within[-n:], counts) or n == len(within)
        )
        shares[".".join(within[-parts:])] = {index: zeros / all_ for index, (zeros, all_) in blocks.items()}
    return shares


def _is_alone(ending: tuple[str, ...], names: Iterable[tuple[str, ...]]) -> bool:
    return sum(name[-len(ending) :] == ending for name in names) == 1


def size_bars(sizes: dict[str, int]) -> str:
    """Bytes of each file group on a logarithmic axis."""
    if not sizes:
        return ""
    ordered = sorted(sizes.items(), key=lambda item: item[1])
    figure, axis = _bars([(name, value, megabytes(value)) for name, value in ordered], MAIN)
    axis.set_xscale("log")
    axis.set_xlim(ordered[0][1] / 3, ordered[-1][1] * 8)
    axis.set_xticks([])
    axis.minorticks_off()
    return _svg(figure, (), "Sizes of files (logarithmic)")


def _bars(rows: list[tuple[str, float, str]], colors: str | list[str]) -> tuple[Any, Any]:
    """A bar of a length, with a name before and words behind it, for each row from below."""
    figure = _figure(HALF, 0.4 + 0.34 * len(rows))
    axis = figure.subplots()
    axis.barh([name for name, _, _ in rows], [value for _, value, _ in rows], color=colors, height=0.62)
    for row, (_, value, words) in enumerate(rows):
        axis.annotate(words, (value, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0, labelsize=9)
    return figure, axis


def megabytes(size: int) -> str:
    """A size in words."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _figure(width: float, height: float) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("report.html needs matplotlib: pip install 'dsee_scale[report]'") from error
    matplotlib.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, axes: Any, title: str) -> str:
    """Inline SVG that takes the page's font and width."""
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(GRID)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.tick_params(colors=MUTED, labelsize=9, length=0)
        axis.xaxis.label.set_color(MUTED)
        axis.yaxis.label.set_color(MUTED)
        axis.set_axisbelow(True)
    for axis in figure.axes:
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_color(INK)
        axis.spines["left"].set_color(GRID)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r"font: ([^;]*?) ?(?:'[^']*'|\"[^\"]*\")(, ?[^;\"]*)?", r"font: \1 inherit", rest)
    return f'{head} role="img" aria-label="{title}">{rest}'


def _smooth(points: list[tuple[int, float]], weight: float = 0.6) -> list[tuple[int, float]]:
    smoothed: list[tuple[int, float]] = []
    mean, norm = 0.0, 0.0
    for step, value in points:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append((step, mean / norm))
    return smoothed


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
