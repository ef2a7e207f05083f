"""How time and memory of inject, score, prune and export grow with the model: Llamas of 0.9 to 6.7 billion parameters.

    python benchmarks/growth.py [--quick] [--json] [--shapes 1b 1.7b 3.4b]
    python benchmarks/growth.py --plot docs/growth.png LINES.jsonl

Random bf16 weights under ZeRO-3 on two ranks of one thread each; fresh processes for each size. All sizes in turn, as
many rounds as asked, and medians of them; a round's passes run once, since each changes its model.

- inject: supports of all q and v matrices by decomposition;
- score: statistics of all linear layers over 128 tokens a rank;
- prune: an exact mask of half of all block weights by |W|;
- export: the whole model into files, on the disk.

Time, by the clock and the processor's (which a busy machine changes less), is given per billion parameters; its peer is
the smallest model's, so the ratio says how far growth is from linear.
Memory is what a pass takes at its peak beyond what the process had before it, in MiB and in units of the widest weight
(embeddings, here): a pass that holds one weight at a time may grow with that one, but not with the number of weights.
What is freed goes back to the system at once, in blocks of at least 1 MiB, so that resident memory is what is held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from _ranks import PeakMemory
from _report import Report, parser
from scale import SHAPES, build, run_on, runnable

PASSES = ("inject", "score", "prune", "export")
TOKENS = 128


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shapes", choices=SHAPES, nargs="+", default=["1b", "1.7b", "3.4b"])
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--folder", help="where exports go for a moment (default: the temporary folder)")
    arguments.add_argument("--plot", type=Path, help="only draw the lines of earlier runs into this file")
    arguments.add_argument("lines", type=Path, nargs="*", help="what earlier runs with --json printed")
    args = arguments.parse_args()
    if args.plot:
        return save_plot(
            args.plot, [json.loads(x) for path in args.lines for x in path.read_text().splitlines()]
        )
    measure(args)
    return None


def measure(args: argparse.Namespace) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # the ranks read it when they start
    report, first = Report("growth", args.json), {}
    shapes, rounds = (["small"], 1) if args.quick else (args.shapes, args.rounds)
    runs: dict[str, list[list[dict[str, Any]]]] = {shape: [] for shape in shapes}
    for _ in range(rounds):
        for shape in shapes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                runs[shape].append(run_on(args.ranks, run_passes, shape, folder))
    for shape in shapes:
        some = runs[shape][0][0]
        billions, widest = some["parameters"] / 1e9, some["widest"] / 2**20
        for name in PASSES:
            seconds, cpu, memory = (
                statistics.median(max(rank[what][name] for rank in ranks) for ranks in runs[shape]) / unit
                for what, unit in (("seconds", billions), ("cpu", billions), ("memory", 2**20))
            )
            peers = first.setdefault(name, (seconds, cpu, memory))
            case, details = f"{shape}, {args.ranks} ranks", {"billions": billions}
            report.add(case, f"{name}, time per billion", "s", seconds, peers[0], **details)
            report.add(case, f"{name}, processor time per billion", "s", cpu, peers[1], **details)
            report.add(case, f"{name}, peak beyond before", "MiB", memory, peers[2], **details)
            report.add(case, f"{name}, peak over widest weight", "1", memory / widest, **details)


def run_passes(shape: str, folder: str) -> dict[str, Any]:
    """Collective. Seconds and bytes of each pass on this rank."""
    import dsee_scale
    from dsee_scale.partition import open_partition

    model = build(shape)
    port = open_partition(model)
    generator = torch.Generator().manual_seed(port.rank)
    batch = {"input_ids": torch.randint(0, 1000, (1, TOKENS), generator=generator)}
    passes: dict[str, Callable[[], Any]] = {
        "inject": lambda: dsee_scale.inject(
            model, dsee_scale.DSEEConfig(rank=16, num_sparse=64), progress=False
        ),
        "score": lambda: dsee_scale.calibrate(runnable(model), [batch], progress=False),
        "prune": lambda: dsee_scale.prune(
            model, dsee_scale.PruneConfig(sparsity=0.5, score="W"), progress=False
        ),
        "export": lambda: dsee_scale.export_model(model, f"{folder}/exported", progress=False),
    }
    found: dict[str, Any] = {"seconds": {}, "cpu": {}, "memory": {}}
    numels = [port.shape(param).numel() for param in model.parameters()]
    found["parameters"], found["widest"] = sum(numels), 2 * max(numels)
    for name in PASSES:
        port.sum_over_ranks(torch.ones(1)).item()  # waits for every rank
        before = psutil.Process().memory_info().rss
        started, started_cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as memory:
            passes[name]()
        found["seconds"][name] = time.perf_counter() - started
        found["cpu"][name] = time.process_time() - started_cpu
        found["memory"][name] = max(0, memory.peak - before)
    port.sum_over_ranks(torch.ones(1)).item()  # waits for every rank
    if port.rank == 0:
        shutil.rmtree(f"{folder}/exported")
        os.sync()
    return found


def save_plot(path: Path, lines: list[dict[str, Any]]) -> None:
    """Two panels over billions of parameters: time per billion, and peak memory over the widest weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, label in zip(
        panels,
        ("time per billion", "peak over widest weight"),
        ("seconds per billion parameters", "peak, in widest weights"),
        strict=True,
    ):
        for name in PASSES:
            points = sorted((x["billions"], x["ours"]) for x in lines if x["metric"] == f"{name}, {metric}")
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xlabel("billions of parameters")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[1].legend(loc="upper right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
