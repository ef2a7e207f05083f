"""A run's `metrics.json` and one self-contained `report.html`."""

from __future__ import annotations

import html
import io
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError
from dsee_scale.training.journal import Journal, to_jsonable

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
TEMPLATE = "report_template.html"
HEADLINE_METRICS = ("accuracy", "bleu", "perplexity", "loss")
PHASE_WORDS = {
    "before": "before tuning",
    "tuned": "tuned",
    "pruned": "pruned",
    "retuned": "retuned",
    "exported": "exported, in stock transformers",
}


def write_metrics(output: Path, journal: Journal, log_history: Sequence[dict[str, Any]]) -> None:
    """Write `metrics.json`: run, phases, matrices, times, sizes, and the losses that the Trainer logged."""
    keys = ("step", "loss", "learning_rate", "grad_norm")
    training = [{key: entry.get(key) for key in keys} for entry in log_history if "loss" in entry]
    metrics = to_jsonable({**journal.to_dict(), "training": training})
    (output / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def write_report(output: Path) -> Path:
    """Make `report.html` from the folder's `metrics.json`; it needs nothing else to be looked at."""
    metrics = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    metric = headline_metric(metrics)
    quality = [
        (PHASE_WORDS.get(phase["phase"], phase["phase"]), float(phase["quality"][metric]))
        for phase in metrics["phases"]
        if phase["quality"].get(metric) is not None
    ]
    template = string.Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(f"{_short(metrics['run']['model'])}: {metrics['run']['task'].replace('_', ' ')}"),
        subtitle=html.escape(_subtitle(metrics["run"])),
        cards="".join(_card(*words) for words in _headlines(metrics, metric)),
        metric=html.escape(metric),
        quality=quality_bars(quality, metric),
        loss=loss_curve(metrics),
        sparsity=sparsity_map(metrics["matrices"]),
        sizes=size_bars(metrics["sizes"]),
        phases=_phase_table(metrics["phases"]),
        times=_rows((name, _seconds(value)) for name, value in metrics["seconds"].items()),
        settings=html.escape(json.dumps({k: metrics["run"][k] for k in ("dsee", "prune")}, indent=2)),
    )
    path = output / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(output: Path) -> str:
    """The phases as a plain-text table, for a terminal."""
    return phase_table(json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))["phases"])


def phase_table(phases: list[dict[str, Any]]) -> str:
    """Phases as a table in Markdown."""
    header, rows = _phase_cells(phases)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def headline_metric(metrics: dict[str, Any]) -> str:
    """The number that says most about this task."""
    found = {key for phase in metrics["phases"] for key in phase["quality"]}
    return next((name for name in HEADLINE_METRICS if name in found), "loss")


def _headlines(metrics: dict[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """(value, label, remark) of each card."""
    run, phases = metrics["run"], metrics["phases"]
    values = [phase["quality"].get(metric) for phase in phases]
    last = phases[-1]
    cards = [
        (f"{_value(values[0])} → {_value(values[-1])}", metric, f"{_words(phases[0])} → {_words(last)}"),
        (f"{100 * last['sparsity']:.2f}%", "of block weights are zero", f"{last['zeros']:,} weights"),
        (
            f"{100 * run['trainable_share']:.3f}%",
            "of parameters trained",
            f"{run['trainable_parameters']:,} of {run['parameters']:,}",
        ),
    ]
    if "adapter" in metrics["sizes"]:
        masks = metrics["sizes"].get("masks", 0)
        remark = f"and {megabytes(masks)} of mask bits" if masks else "no base weight in it"
        cards.append((megabytes(metrics["sizes"]["adapter"]), "adapter file", remark))
    return cards


def _phase_cells(phases: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(key for phase in phases for key in phase["quality"]))
    header = ["phase", *names, "zeros in blocks", "seconds", "peak memory per rank"]
    rows = [
        [
            _words(phase),
            *(_value(phase["quality"].get(name)) for name in names),
            f"{100 * phase['sparsity']:.2f}%",
            _seconds(phase.get("seconds")),
            ", ".join(f"{size / 2**30:.2f} GiB" for size in sorted(set(phase["peak_memory_bytes"]))),
        ]
        for phase in phases
    ]
    return header, rows


def _phase_table(phases: list[dict[str, Any]]) -> str:
    header, rows = _phase_cells(phases)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rows(pairs: Any) -> str:
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in pairs)
    return f"<table><tbody>{cells}</tbody></table>"


def _card(value: str, label: str, remark: str) -> str:
    parts = (html.escape(text) for text in (value, label, remark))
    return '<div class="card"><b>{}</b><span>{}</span><small>{}</small></div>'.format(*parts)


def _subtitle(run: dict[str, Any]) -> str:
    engine = "DeepSpeed" if run["deepspeed"] else "no DeepSpeed"
    ranks = f"{run['world_size']} process" + ("es" if run["world_size"] > 1 else "")
    return f"{ranks} on {run['device']}, {engine}, {run['dtype']}, dsee_scale {run['dsee_scale']}"


def _words(phase: dict[str, Any]) -> str:
    return PHASE_WORDS.get(phase["phase"], phase["phase"])


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


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
    colors = [SECOND, *(ACCENT if name == "pruned" else MAIN for name, _ in phases[1:])]
    figure, axis = _bars([(name, value, _number(value)) for name, value in phases], colors)
    axis.invert_yaxis()
    axis.set_xlim(0, max(value for _, value in phases) * 1.14 or 1)
    return _svg(figure, (), f"{metric} at each phase")


def sparsity_map(matrices: dict[str, list[int]]) -> str:
    """Fraction of zeros of every pruned matrix: one row per kind, one column per block."""
    cells: dict[str, dict[int, float]] = {}
    for name, (zeros, entries) in matrices.items():
        block = re.search(r"\.(\d+)\.", name)
        kind = name.rsplit(".", 1)[-1]
        cells.setdefault(kind, {})[int(block.group(1)) if block else 0] = zeros / entries
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
