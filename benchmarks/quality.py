"""What pruning costs in quality: SmolLM2-135M tuned, pruned, retuned and exported, beside its peers.

    python examples/demo/demo_inputs.py
    python benchmarks/quality.py --job sentiment [--seeds 1 2 3] [--rows "dense LoRA" "ours, 50%"]
    python benchmarks/quality.py --job e2e --files devset.csv
    python benchmarks/quality.py --job text --files train.txt test.txt
    python benchmarks/quality.py --cells benchmarks/quality_cells --plot docs/quality.png > docs/quality.md
    python benchmarks/quality.py --judge runs/sentiment/model [--unseen SEED]                 # exported ones alone

Every row of a seed starts from the same weights and batches and gets as many steps in all as dense LoRA (PEFT), at
most 1% of the parameters trained: rank 4 on all linear layers. The tuned start of a seed is shared.
Each finished cell is kept in --cells, so the script may be stopped and goes on; those that the docs' tables are of are
in benchmarks/quality_cells. With --plot it measures nothing, draws what is there and prints its tables.
Exported models are judged in stock transformers, zeros are counted in their files. One process, any device.
Rows of llm-compressor's are there where it is installed (pip install llmcompressor).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _quality_jobs import METRIC, METRIC_WORDS
from _quality_lab import Lab, add_arguments, judged, settle
from _quality_report import UNTUNED, print_table, print_tables, save_plot
from _quality_rows import DENSE, OURS, PEERS, RAISED, dense_lora, ours, pruned_then_lora, untuned
from _report import Report, parser


def cell(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """A finished cell, measured now if it is not there yet."""
    path, settings = lab.args.cells / lab.args.job / f"{row}, seed {seed}.json", lab.settings()
    if path.is_file():
        known = json.loads(path.read_text())
        if known["settings"] != settings:
            sys.exit(
                f"quality: {path} was measured with {known['settings']}, not {settings}: choose other --cells"
            )
        return known
    measure: Callable[[Lab, str, int], dict[str, Any]]
    dense = {UNTUNED: untuned, DENSE: dense_lora, DENSE + RAISED: dense_lora}
    measure = dense.get(row, ours if row in OURS else pruned_then_lora)
    started = time.perf_counter()
    found = measure(lab, row, seed) | {"seconds": time.perf_counter() - started, "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(path)
    return found


def main() -> None:
    """Measure what is missing, print all."""
    arguments = parser(__doc__)
    add_arguments(arguments)
    arguments.add_argument("--rows", nargs="+", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments.add_argument(
        "--trained_norms", action="store_true", help="train the norms besides the adapters, in every row"
    )
    arguments.add_argument(
        "--cells", type=Path, help="for the finished cells' numbers; default: OUTPUT/cells"
    )
    arguments.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw and print all jobs' finished cells; no more"
    )
    arguments.add_argument(
        "--judge", type=Path, nargs="+", metavar="FOLDER", help="judge these models by the job; no more"
    )
    arguments.add_argument(
        "--unseen",
        type=int,
        metavar="SEED",
        help="with --judge, sentiment: judge by all training rows that no row of this seed has seen (about 5,400)",
    )
    args = arguments.parse_args()
    if args.plot:
        cells = args.cells or Path(args.output) / "cells"
        print_tables(cells)
        save_plot(cells, args.plot)
        return
    if args.quick:
        args.rows = ["dense LoRA", "ours, 50%"]
    if not settle(args):
        return
    args.cells = args.cells or Path(args.output) / "cells"
    lab, report = Lab(args), Report("quality", args.json)
    if args.judge:
        if args.unseen is not None:
            lab.judge_by_unseen(args.unseen)
        for folder in args.judge:
            for metric, value in judged(lab, folder)["exported"].items():
                report.add(f"{args.job}: {folder}", metric, "", value)
        return
    rows = {row: [cell(lab, row, seed) for seed in args.seeds] for row in args.rows}
    metric, words = METRIC[args.job], METRIC_WORDS[args.job]
    peer = [one["exported"][metric] for one in rows.get("dense LoRA", [])]
    for row, found in rows.items():
        value = statistics.mean(one["exported"][metric] for one in found)
        report.add(f"{args.job}: {row}", words, "", value, statistics.mean(peer) if peer else None)
    if not args.json:
        print_table(args.job, rows)


if __name__ == "__main__":
    main()
