"""A run's `metrics.json` and one self-contained `report.html`."""

from __future__ import annotations

import html
import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError
from dsee_scale.training.figures import (
    loss_curve,
    megabytes,
    quality_bars,
    quality_picture,
    size_bars,
    sparsity_map,
)
from dsee_scale.training.journal import Journal, metric_words, to_jsonable

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
PICTURE_FILE = "dsee_quality.png"
TEMPLATE = "report_template.html"
HEADLINE_METRICS = ("accuracy", "bleu", "perplexity", "loss")
LOWER_IS_BETTER = ("perplexity", "loss")
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
    template = string.Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(f"{_short(metrics['run']['model'])}: {metrics['run']['task'].replace('_', ' ')}"),
        subtitle=html.escape(_subtitle(metrics["run"])),
        cards="".join(_card(*words) for words in _headlines(metrics, metric)),
        losses="".join(f'<p class="loss">{html.escape(line)}</p>' for line in losses(metrics)),
        metric=html.escape(metric_words(metric, metrics["run"])),
        quality=quality_bars(_quality(metrics, metric), metric),
        loss=loss_curve(metrics),
        sparsity=sparsity_map(metrics["matrices"]),
        sizes=size_bars(metrics["sizes"]),
        phases=_phase_table(metrics),
        times=_rows((name, _seconds(value)) for name, value in metrics["seconds"].items()),
        settings=html.escape(json.dumps({k: metrics["run"][k] for k in ("dsee", "prune")}, indent=2)),
    )
    path = output / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(output: Path) -> str:
    """The phases as a plain-text table, and which of them made the model worse; for a terminal."""
    metrics = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    return "\n".join([phase_table(metrics), *losses(metrics)])


def losses(metrics: dict[str, Any]) -> list[str]:
    """A sentence for each phase that ended below the untouched model, and one if retuning took more than it gave."""
    metric = headline_metric(metrics)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    words, quality = metric_words(metric, metrics["run"]), _quality(metrics, metric)
    values = dict(quality)
    before, pruned, retuned = (values.get(PHASE_WORDS[name]) for name in ("before", "pruned", "retuned"))
    found = [
        f"Worse than before the run: {words} {_value(value)} {phase}, {_value(before)} before."
        for phase, value in quality
        if before is not None and sign * value < sign * before
    ]
    if pruned is not None and retuned is not None and sign * retuned < sign * pruned:
        loss = dict(_quality(metrics, "loss"))
        lost, after = (loss.get(PHASE_WORDS[name], math.nan) for name in ("pruned", "retuned"))
        advice = (
            f"but the loss fell from {_value(lost)} to {_value(after)}, so a few examples may make the difference."
            if after < lost
            else "a lower retune.learning_rate or fewer steps may be enough."
        )
        found.append(
            f"Retuning made it worse: {words} {_value(pruned)} before it, {_value(retuned)} after; {advice}"
        )
    return found


def phase_table(metrics: dict[str, Any]) -> str:
    """The phases of a run's metrics as a table in Markdown."""
    header, rows = _phase_cells(metrics)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def card_notes(metrics: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """What a model card says about a run: its phases and the report's first picture; and the picture's file.

    Args:
        metrics: what `write_metrics` writes, or a journal's values.
    """
    if not metrics["phases"]:
        return "", {}
    measured = "\n\n".join([phase_table(metrics), *losses(metrics)])
    notes, metric = f"## What was measured\n\n{measured}", headline_metric(metrics)
    try:
        picture = quality_picture(_quality(metrics, metric))
    except ConfigError:  # no matplotlib: the run says so when it writes its report
        return notes, {}
    alt = f"{metric_words(metric, metrics['run'])} at each phase"
    return f"{notes}\n\n![{alt}]({PICTURE_FILE})", {PICTURE_FILE: picture}


def _quality(metrics: dict[str, Any], metric: str) -> list[tuple[str, float]]:
    """A metric's finite values, phase by phase."""
    return [
        (_words(phase), float(phase["quality"][metric]))
        for phase in metrics["phases"]
        if phase["quality"].get(metric) is not None
    ]


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
        (
            f"{_value(values[0])} → {_value(values[-1])}",
            metric_words(metric, run),
            f"{_words(phases[0])} → {_words(last)}",
        ),
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


def _phase_cells(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    phases = metrics["phases"]
    names = list(dict.fromkeys(key for phase in phases for key in phase["quality"]))
    words = [metric_words(name, metrics["run"]) for name in names]
    header = ["phase", *words, "zeros in blocks", "seconds", "peak memory per rank"]
    rows = [
        [
            _words(phase),
            *(_value(phase["quality"].get(name)) for name in names),
            f"{100 * phase['sparsity']:.2f}%",
            _seconds(phase.get("seconds")),
            _gibibytes(phase["peak_memory_bytes"]),
        ]
        for phase in phases
    ]
    return header, rows


def _phase_table(metrics: dict[str, Any]) -> str:
    header, rows = _phase_cells(metrics)
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


def _gibibytes(sizes: Sequence[int]) -> str:
    """The smallest and the largest of all ranks, one where they look alike."""
    ends = dict.fromkeys(f"{size / 2**30:.2f}" for size in (min(sizes), max(sizes)))
    return f"{' to '.join(ends)} GiB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
