"""How both TRL examples start: arguments, the process group, and settings that have nothing to do with DSEE."""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
import torch._dynamo


def step_or_fraction(word: str) -> int | float:
    """When to prune, as `DSEECallback` takes it."""
    return int(word) if word.isdecimal() else float(word)


def parse_arguments(description: str | None, columns: str) -> argparse.Namespace:
    """The command line; `columns` says what the rows hold."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help=f"JSON lines with {columns}")
    parser.add_argument("--output_dir", required=True, help="where checkpoints and results go")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_cpu.json", help="DeepSpeed JSON")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument(
        "--prune_at",
        type=step_or_fraction,
        default=0.5,
        help="fraction of the training, or a whole step",
    )
    parser.add_argument("--resume", action="store_true", help="trl_sft: go on from the last checkpoint")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def usual_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of any TRL config, before the model is loaded."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else accelerate starts one process alone
        deepspeed.init_distributed(dist_backend="gloo")
    return dict(
        output_dir=args.output_dir,
        deepspeed=args.deepspeed_config,
        max_steps=args.max_steps,
        save_steps=args.save_steps,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        logging_steps=1,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        max_length=256,
        report_to="none",
    )
