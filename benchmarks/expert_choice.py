"""Which experts go: a quarter of every layer's removed by REAP, by frequency and at random, from one tuned model on.

    python examples/moe/small_moe.py --text TEXT.txt && python examples/demo/demo_inputs.py     # once
    python benchmarks/expert_choice.py --json

Runs `recipes/moe.yaml` once for each score, on `--processes` ranks under ZeRO-3: tune, remove, retune, export, and load
the folder in stock transformers. Loss in nats per token of held-out sentences: tuned, pruned, retuned, and of the
exported folder, which must be the retuned one's and have fewer experts in its config. Runs of one seed are the same
until the pruning. `peer` is the tuned model before anything was removed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import Report, parser

RECIPE = Path(__file__).parents[1] / "recipes" / "moe.yaml"
SCORES = ("reap", "frequency", "random")
QUICK = ["--max_steps", "8", "--retune.max_steps", "4", "--data.max_eval_samples", "64"]
BATCH = 8
SAME = 1e-3
"""Nats by which the exported folder may differ from the live model."""


def run(score: str, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of the recipe; its `metrics.json`."""
    words = ["run", str(RECIPE), "--prune.score", score, "--output_dir", str(output)]
    words += ["--seed", str(arguments.seed), *(QUICK if arguments.quick else [])]
    words += ["--per_device_train_batch_size", str(BATCH // arguments.processes)]
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes), "-m"]
    alone = arguments.processes == 1
    program = [sys.executable, "-m", *([] if alone else ranks), "dsee_scale"]
    words += ["--deepspeed", "null"] if alone else []
    done = subprocess.run([*program, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((output / "metrics.json").read_text())


def check_export(output: Path, losses: dict[str, float]) -> int:
    """Experts of the exported folder; an error if it is not the retuned model, or not a smaller one."""
    from transformers import AutoConfig

    if abs(losses["exported"] - losses["retuned"]) > SAME:
        raise SystemExit(f"{output}: exported {losses['exported']}, retuned {losses['retuned']}")
    kept = AutoConfig.from_pretrained(output / "model").num_experts
    if kept != 18:
        raise SystemExit(f"{output}: {kept} experts, expected 18 of 24")
    return kept


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--score", choices=SCORES, help="only this one")
    arguments.add_argument("--processes", type=int, default=2, help="ranks under ZeRO-3; 1 runs without")
    arguments.add_argument("--seed", type=int, default=1)
    arguments = arguments.parse_args()
    report = Report("expert_choice", arguments.json, seed=arguments.seed)
    for score in [arguments.score] if arguments.score else SCORES:
        with tempfile.TemporaryDirectory() as folder:
            output, started = Path(folder) / score, time.perf_counter()
            metrics = run(score, output, arguments)
            seconds = time.perf_counter() - started
            losses = {phase["phase"]: phase["quality"]["loss"] for phase in metrics["phases"]}
            kept = check_export(output, losses)
        for phase in ("pruned", "retuned", "exported"):
            details = {"before": losses["before"], "experts": kept, "seconds": seconds}
            report.add(f"{score}, {phase}", "loss", "nats", losses[phase], losses["tuned"], **details)


if __name__ == "__main__":
    main()
