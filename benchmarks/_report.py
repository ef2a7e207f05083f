"""What every benchmark shares: arguments, timing, and one line per measured case.

    arguments = parser(__doc__).parse_args()
    report = Report("masks", arguments.json)
    seconds, peer = median_seconds_each(ours, theirs)
    report.add("33.5M fp32", "time", "s", ours=seconds, peer=peer)

A case is printed as soon as it is measured: a JSON object per line with `--json`, else a row of a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WIDTHS = (44, 26, 9, 12, 12, 8)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--json` and `--quick`; add what the benchmark needs besides."""
    if not torch.cuda.is_available():  # else DeepSpeed says among our lines that it found nothing but a CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", action="store_true", help="one JSON object per case instead of a table")
    result.add_argument("--quick", action="store_true", help="small cases only, under a minute")
    return result


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of `repeats` calls after `warmup` calls that do not count."""
    return median_seconds_each(function, repeats=repeats, warmup=warmup)[0]


def median_seconds_each(*functions: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Medians for several functions, called in turn, so that a busy machine slows all of them alike."""
    for _ in range(warmup):
        for function in functions:
            function()
    rounds = [[seconds_of(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


class Report:
    """Prints cases as they are measured and keeps them in `cases`."""

    def __init__(self, benchmark: str, as_json: bool, **always: Any) -> None:
        """`always` are JSON keys of every line."""
        self.benchmark, self.as_json, self.always = benchmark, as_json, always
        self.cases: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        metric: str,
        unit: str,
        ours: float,
        peer: float | None = None,
        **details: Any,
    ) -> None:
        """Record one case. `ratio` is ours / peer, null without a peer; `details` are further JSON keys."""
        ratio = ours / peer if peer else None
        line = {"benchmark": self.benchmark, "case": case, "metric": metric, "unit": unit}
        line |= {"ours": ours, "peer": peer, "ratio": ratio} | self.always | details
        self.cases.append(line)
        if self.as_json:
            print(json.dumps(line), flush=True)
            return
        if len(self.cases) == 1:
            _print_row("case", "metric", "unit", "ours", "peer", "ratio")
        _print_row(case, metric, unit, *(_short(value) for value in (ours, peer, ratio)))


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, (int, bool)) else f"{value:.4g}"


def _print_row(*cells: str) -> None:
    left, right = cells[:3], cells[3:]
    texts = [text.ljust(width) for text, width in zip(left, WIDTHS[:3], strict=True)]
    texts += [text.rjust(width) for text, width in zip(right, WIDTHS[3:], strict=True)]
    print(" ".join(texts).rstrip(), flush=True)
