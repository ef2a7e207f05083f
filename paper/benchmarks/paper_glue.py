"""The paper's two stages on a BertModel, under ZeRO-3 in two processes, beside LoRA by PEFT.

    python paper/benchmarks/paper_glue.py --model FOLDER --train_file TRAIN.csv --validation_file DEV.csv

Prints accuracy, one column a seed: LoRA by PEFT, DSEE by this package, DSEE after each second stage (20% + 20%
of the weights by ABS, and 3 heads of each layer, both retuned), and the untuned model.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LORA = "--apply_lora --lora_r 16"
DSEE = f"{LORA} --apply_sparse --num_sparse 64"
UNSTRUCTURED = f"{DSEE} --prune_mode ABS --pruning_ratio 0.2 --ad_pruning_ratio 0.2 --export_delta masked"
STRUCTURED = f"{DSEE} --prune_mode ABS --prune_heads_num 3"
EVALUATE = "--max_steps 1 --learning_rate 1e-12"
ROWS = {
    "LoRA, rank 16, by PEFT": ("paper/benchmarks/_peft_glue.py", None, LORA),
    "DSEE, rank 16, N 64": ("paper/run_glue.py", None, f"{DSEE} --export_delta none"),
    "DSEE, 20% + 20% pruned by ABS": ("paper/run_glue.py", "DSEE, rank 16, N 64", UNSTRUCTURED),
    "DSEE, 3 of 12 heads gone": ("paper/run_glue.py", "DSEE, rank 16, N 64", STRUCTURED),
    "before tuning": ("paper/run_glue.py", None, f"{LORA} {EVALUATE} --export_delta none"),
}


def launch(script: str, words: list[str], processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["deepspeed", "--num_gpus", str(processes), "--master_port", str(port), script, *words]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def measure(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    common = f"--do_train --do_eval --max_seq_length 128 --pad_to_max_length False --seed {seed} --disable_tqdm True "
    common += (
        f"--per_device_train_batch_size {args.batch_size} --per_device_eval_batch_size 64 --logging_steps 10 "
    )
    common += f"--max_steps {args.steps} --learning_rate {args.learning_rate} --save_strategy no "
    common += (
        f"--train_file {args.train_file} --validation_file {args.validation_file} --overwrite_output_dir "
    )
    common += f"--deepspeed {args.deepspeed} --max_eval_samples {args.eval_samples}"
    found: dict[str, dict[str, float]] = {}
    for index, (name, (script, start, flags)) in enumerate(ROWS.items()):
        output = folder / f"{seed}_{index}"
        begin = str(folder / f"{seed}_{list(ROWS).index(start)}") if start else args.model
        words = ["--model_name_or_path", begin, "--output_dir", str(output), *common.split(), *flags.split()]
        if not (output / "all_results.json").is_file():
            launch(script, words, args.processes)
        found[name] = json.loads((output / "all_results.json").read_text())
        print(
            f"seed {seed}: {name}: accuracy {found[name]['eval_accuracy']:.3f}", file=sys.stderr, flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "train_file", "validation_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output_dir", help="keep the runs here; finished ones are not run again")
    parser.add_argument("--deepspeed", default="ds_configs/zero3_cpu.json")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of tuning, and of each retuning")
    parser.add_argument("--batch_size", type=int, default=8, help="examples of a step and process")
    parser.add_argument("--eval_samples", type=int, default=1000)
    parser.add_argument("--learning_rate", default="2e-4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        runs = [measure(args, seed, Path(args.output_dir or own)) for seed in args.seeds]
    columns = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"| accuracy | {columns} | mean | zeros in blocks | trained in updates |")
    print("| --- |" + " ---: |" * (len(args.seeds) + 3))
    for name in ROWS:
        values = [run[name]["eval_accuracy"] for run in runs]
        last = runs[-1][name]
        cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
        cells += [f"{100 * last.get('block_sparsity', 0.0):.2f}%", f"{last['trained_in_updates']:,}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
