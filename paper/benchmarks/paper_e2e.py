"""Data to text on E2E: LoRA, DSEE, and DSEE at 20% and 50% sparsity by the scores W and ABS.

    python paper/benchmarks/paper_e2e.py --model FOLDER --data_file devset.csv [--seeds 1 2 3] [--steps 300]

`devset.csv` has the columns mr and ref; a sixth of its meaning representations is held out with all their
references. Every variant gets the same steps, batches and seeds; the pruned ones are pruned after two thirds of
them. Prints one row a variant: BLEU (beams of 4) and loss in nats per token on the held-out part. `--launch
"deepspeed --num_gpus 2"` with `--deepspeed FILE` partitions the weights; runs that are finished in --output_dir
are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
VARIANTS: dict[str, tuple[int | None, str | None, float]] = {
    "LoRA": (None, None, 0.0),
    "DSEE": (64, None, 0.0),
    "DSEE, 20% by W": (64, "W", 0.2),
    "DSEE, 20% by ABS": (64, "ABS", 0.2),
    "DSEE, 50% by W": (64, "W", 0.5),
    "DSEE, 50% by ABS": (64, "ABS", 0.5),
}


def split(source: str, folder: Path) -> None:
    """train.csv and dev.csv without a meaning representation in common."""
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    meanings = sorted({row["mr"] for row in rows})
    held_out = set(random.Random(0).sample(meanings, len(meanings) // 6))
    for name, inside in (("train", False), ("dev", True)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if (row["mr"] in held_out) == inside)


def recipe(args: argparse.Namespace, folder: Path, name: str, seed: int) -> dict[str, Any]:
    num_sparse, score, sparsity = VARIANTS[name]
    first = args.steps if score is None else args.steps * 2 // 3
    pools = [{"name": kind, "select": kind, "sparsity": sparsity} for kind in ("adapted", "others")]
    return {
        "model": {"name": args.model},
        "data": {
            "task": "completion",
            "train_file": str(folder / "train.csv"),
            "validation_file": str(folder / "dev.csv"),
            "prompt": "{mr} ||",
            "completion": " {ref}",
            "max_length": 192,
            "max_eval_samples": args.eval_samples,
            "generate_samples": args.generate_samples,
            "generation": {"max_new_tokens": 64, "num_beams": 4, "no_repeat_ngram_size": 4},
        },
        "dsee": {"rank": 4, "alpha": 32, "num_sparse": num_sparse, "target_modules": ["q_proj", "v_proj"]},
        "prune": None if score is None else {"score": score, "pools": pools},
        "training": {
            "output_dir": str(folder / f"{name}, seed {seed}"),
            "deepspeed": args.deepspeed,
            "max_steps": first,
            "per_device_train_batch_size": args.batch_size,
            "per_device_eval_batch_size": 16,
            "learning_rate": args.learning_rate,
            "warmup_steps": 0.05,
            "logging_steps": 20,
            "save_strategy": "no",
            "dataloader_drop_last": True,
            "disable_tqdm": True,
            "bf16": args.bf16,
            "seed": seed,
        },
        "retune": None if score is None else {"max_steps": args.steps - first},
        "export": None,
    }


def run(args: argparse.Namespace, folder: Path, name: str, seed: int) -> dict[str, Any]:
    values = recipe(args, folder, name, seed)
    output = Path(values["training"]["output_dir"])
    if not (output / "metrics.json").is_file():
        path = folder / f"{name}, seed {seed}.yaml"
        path.write_text(yaml.safe_dump(values))
        command = [*shlex.split(args.launch), "launch/finetune.py", str(path)]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    phase = json.loads((output / "metrics.json").read_text())["phases"][-1]
    found = {**phase, **phase["quality"]}
    print(
        f"{name}, seed {seed}: BLEU {found['bleu']:.1f}, loss {found['loss']:.3f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_file", required=True)
    parser.add_argument("--output_dir")
    parser.add_argument("--launch", default=sys.executable, help='e.g. "deepspeed --num_gpus 2"')
    parser.add_argument("--deepspeed", help="DeepSpeed JSON for such a launch")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--eval_samples", type=int, default=400)
    parser.add_argument("--generate_samples", type=int, default=90)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if args.deepspeed:
        args.deepspeed = str(Path(args.deepspeed).resolve())
    with tempfile.TemporaryDirectory() as own:
        folder = Path(args.output_dir or own).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        split(args.data_file, folder)
        table = {name: [run(args, folder, name, seed) for seed in args.seeds] for name in VARIANTS}
    print("| variant | BLEU | loss | zeros in blocks |\n| --- | ---: | ---: | ---: |")
    for name, runs in table.items():
        bleu, loss = ([found[key] for found in runs] for key in ("bleu", "loss"))
        spread = f" ± {statistics.stdev(bleu):.1f}" if len(runs) > 1 else ""
        zeros = 100 * runs[0]["sparsity"]
        print(
            f"| {name} | {statistics.mean(bleu):.1f}{spread} | {statistics.mean(loss):.3f} | {zeros:.2f}% |"
        )


if __name__ == "__main__":
    main()
