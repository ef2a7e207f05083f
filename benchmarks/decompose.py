"""Where the sparse entries go: time, planted entries found, and how firm the choice is. One thread.

    python benchmarks/decompose.py
    python benchmarks/decompose.py --study MODEL_FOLDER --plot docs/decomposition.png

Times are wall-clock; "CPU time" beside them is what the one thread itself spent, which is the same on an
idle machine and tells more on a busy one. The peer of a time is the paper's GreBsmo loop
(`_planted.reference_loop`); the peer of the counts by method is magnitude, the N largest |W|. Counts are
means over three weights (one with `--quick`). `--study` counts on the linear weights of a model folder's
`model.safetensors` too, with outliers planted in them, and shows what their supports depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
from _decompose_study import save_plot, study
from _planted import (
    Planted,
    hard_threshold_loop,
    largest,
    planted_matrix,
    reference_loop,
    reference_start,
)
from _report import Report, parser
from torch import Tensor

from dsee_scale.algorithms.decompose import find_support
from dsee_scale.algorithms.reference import reference_low_rank
from dsee_scale.config import DecompositionConfig

PICKS = 64
KINDS = {
    "equal outliers": {},
    "no noise": {"noise": 0.0},
    "decaying spectrum": {"decay": 1.0},
    "outliers up to 55x": {"heavy": True},
}
NO_CLIP = 1e9
METHODS = {
    "fast": {},
    "fast, rank 8": {"rank": 8},
    "fast, rank 16": {"rank": 16},
    "fast, rank 32": {"rank": 32},
    "fast, rank 96": {"rank": 96},
    "fast, 1 iteration": {"iterations": 1},
    "fast, 4 iterations": {"iterations": 4},
    "fast, clip 3": {"clip": 3.0},
    "fast, clip 12": {"clip": 12.0},
    "fast, no clip": {"clip": NO_CLIP},
}


def support_positions(weight: Tensor, count: int = PICKS, seed: int = 0, **settings: object) -> Tensor:
    """Flat positions chosen with `DecompositionConfig(**settings)`."""
    generator = torch.Generator().manual_seed(seed)
    support = find_support(weight, count, "grebsmo", DecompositionConfig(**settings), generator)
    return support.rows.long() * weight.shape[1] + support.cols


def times_of(function: Callable[[], object], repeats: int = 1, warmup: int = 0) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of a call."""
    for _ in range(warmup):
        function()
    rounds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        rounds.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*rounds, strict=True)
    return median(walls), median(cpus)


def add_times(
    report: Report, case: str, ours: tuple[float, float], peer: tuple[float, float] | None = None
) -> None:
    for index, metric in enumerate(("time", "CPU time")):
        report.add(case, metric, "s", ours[index], peer[index] if peer else None)


def against_reference(report: Report) -> None:
    """The headline: the default against the paper's loop in float32."""
    planted = planted_matrix(768, 768, seed=0)
    weight = planted.weight
    low: list[Tensor] = []
    start = reference_start(768, 0, weight.dtype)
    peer = times_of(lambda: low.append(reference_loop(weight, start)))
    ours = times_of(lambda: support_positions(weight), repeats=9, warmup=1)
    case = "planted 768x768 fp32, fast vs the loop"
    add_times(report, case, ours, peer)
    found = planted.found(support_positions(weight))
    peer_found = planted.found(largest(weight - low[0], PICKS))
    report.add(case, f"planted found of {PICKS}", "entries", found, peer_found)
    by_size = planted.found(largest(weight, PICKS))
    report.add("the same, fast vs magnitude", f"planted found of {PICKS}", "entries", found, by_size)


def reference_preset(report: Report, rounds: int) -> None:
    """The `reference` preset against the loop in float64: time, and the same entries."""
    weight = planted_matrix(768, 768, seed=0, dtype=torch.float64).weight
    start = reference_start(768, 0, weight.dtype)
    low: list[Tensor] = []
    factors: list[tuple[Tensor, Tensor]] = []

    def ours_once() -> None:
        factors.append(reference_low_rank(weight, torch.Generator().manual_seed(0), rounds))

    first = times_of(ours_once)
    peer = times_of(lambda: low.append(reference_loop(weight, start, rounds)))
    second = times_of(ours_once)  # the loop stands between its two rivals
    case = f"reference preset 768x768 fp64, {rounds} rounds"
    add_times(report, case, ((first[0] + second[0]) / 2, (first[1] + second[1]) / 2), peer)
    mine = largest(weight - factors[0][0] @ factors[0][1], PICKS)
    same = int(torch.isin(mine, largest(weight - low[0], PICKS)).sum())
    report.add(case, f"same entries of {PICKS}", "entries", same)


def large_matrices(report: Report, quick: bool) -> None:
    """Time at the sizes of large decoders."""
    sizes = [(4096, 4096, torch.float32, 64)]
    if not quick:
        sizes += [
            (4096, 4096, torch.bfloat16, 64),
            (4096, 4096, torch.float32, 4096 * 4096 // 100),
            (14336, 4096, torch.bfloat16, 64),
        ]
    for rows, cols, dtype, count in sizes:
        generator = torch.Generator().manual_seed(0)
        weight = (0.02 * torch.randn(rows, cols, generator=generator)).to(dtype)
        ours = times_of(lambda w=weight, n=count: support_positions(w, n), repeats=3, warmup=1)
        add_times(report, f"{rows}x{cols} {str(dtype).split('.')[1]}, N = {count}", ours)


def planted_counts(report: Report, quick: bool) -> None:
    """How many planted entries each method and setting finds."""
    shapes = [(384, 384), (768, 768)] if quick else [(384, 384), (768, 768), (2048, 1024)]
    for rows, cols in shapes:
        for kind, options in KINDS.items():
            seeds = (0,) if quick else (0, 1, 2)
            weights = [planted_matrix(rows, cols, seed=seed, **options) for seed in seeds]
            case = f"{rows}x{cols}, {kind}"
            by_size = _mean_found(weights, lambda weight: largest(weight, PICKS))
            for name, settings in METHODS.items():
                found = _mean_found(weights, lambda weight, s=settings: support_positions(weight, **s))
                _add_found(report, case, name, found, by_size)
            hard = _mean_found(
                weights, lambda weight: largest(weight - hard_threshold_loop(weight, 48, 0), PICKS)
            )
            _add_found(report, case, "hard threshold, rank 48", hard, by_size)
            if not quick and rows <= 768:
                found = weights[0].found(support_positions(weights[0].weight, preset="reference"))
                _add_found(report, case, "reference preset", found, by_size)


def _mean_found(weights: list[Planted], choose: Callable[[Tensor], Tensor]) -> float:
    return mean(planted.found(choose(planted.weight)) for planted in weights)


def _add_found(report: Report, case: str, method: str, found: float, by_size: float) -> None:
    report.add(f"{case}: {method}", f"planted found of {PICKS}", "entries", found, by_size)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--study", type=Path, metavar="MODEL_FOLDER", help="also study a model's weights")
    arguments.add_argument("--plot", type=Path, metavar="FILE.png", help="with --study: draw its findings")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    report = Report("decompose", options.json)
    against_reference(report)
    reference_preset(report, rounds=40 if options.quick else 100)
    large_matrices(report, options.quick)
    planted_counts(report, options.quick)
    if options.study:
        findings = study(report, options.study, options.quick)
        if options.plot:
            save_plot(findings, options.plot)


if __name__ == "__main__":
    main()
