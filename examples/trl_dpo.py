"""TRL's DPOTrainer, unmodified, without a second model as reference: tune, prune, retune.

deepspeed --num_gpus 2 examples/trl_dpo.py --model MODEL --data ROWS.jsonl --output_dir OUT

ROWS.jsonl holds lines with `prompt`, `chosen` and `rejected`. A freshly injected model is its base bit for bit, so
the reference's log-probabilities are computed with it before the first step (`precompute_ref_log_probs`), and hold
through training and pruning. In a loop of your own `with dsee_scale.adapters_disabled(model):` is the reference.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
import torch._dynamo
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--output_dir", required=True, help="where checkpoints and the adapter go")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_cpu.json", help="DeepSpeed JSON")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--prune_at", type=float, default=0.5, help="fraction of the training")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else accelerate starts one process alone
        deepspeed.init_distributed(dist_backend="gloo")
    settings = DPOConfig(
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
        precompute_ref_log_probs=True,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model)
    dsee_scale.inject(model, DSEEConfig(rank=16, alpha=32, num_sparse=64))  # (dsee)
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[  # (dsee)
            DSEECallback(
                PruneConfig(sparsity=0.5, score="WABS", scope="matrix", mask_update=False), at=args.prune_at
            )
        ],
    )
    trainer.train()
    report = dsee_scale.export_lora(
        trainer.model_wrapped, f"{args.output_dir}/lora", overwrite=True
    )  # (dsee)
    if trainer.is_world_process_zero():
        print(report)


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
