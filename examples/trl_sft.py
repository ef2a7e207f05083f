"""TRL's SFTTrainer, unmodified: tune, prune and retune by the three lines marked (dsee).

deepspeed --num_gpus 2 examples/trl_sft.py --model MODEL --data ROWS.jsonl --output_dir OUT

ROWS.jsonl holds lines with `prompt` and `completion`. Add --resume to go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed
import torch
import torch._dynamo
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and completion")
    parser.add_argument("--output_dir", required=True, help="where checkpoints and the model go")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_cpu.json", help="DeepSpeed JSON")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--prune_at", type=float, default=0.5, help="fraction of the training")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else accelerate starts one process alone
        deepspeed.init_distributed(dist_backend="gloo")
    settings = SFTConfig(
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
    checkpoint = get_last_checkpoint(args.output_dir) if args.resume else None
    base = Path(args.output_dir) / "base"  # what a re-fit left
    model = AutoModelForCausalLM.from_pretrained(base if checkpoint and base.is_dir() else args.model)
    if checkpoint:
        dsee_scale.load_adapter(model, checkpoint)
    else:
        dsee_scale.inject(model, DSEEConfig(rank=16, alpha=32, num_sparse=64))  # (dsee)
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[DSEECallback(PruneConfig(sparsity=0.5), at=args.prune_at)],  # (dsee)
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    report = dsee_scale.export_model(
        trainer.model_wrapped, f"{args.output_dir}/model", overwrite=True
    )  # (dsee)
    if trainer.is_world_process_zero():
        print(report)


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
