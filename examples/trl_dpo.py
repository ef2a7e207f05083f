"""TRL's DPOTrainer, unmodified, without a second model as reference: tune, prune, retune.

deepspeed --num_gpus 2 examples/trl_dpo.py --model MODEL --data ROWS.jsonl --output_dir OUT

ROWS.jsonl holds lines with `prompt`, `chosen` and `rejected`. A freshly injected model is its base bit for bit, so
the reference's log-probabilities are computed with it before the first step (`precompute_ref_log_probs`), and hold
through training and pruning. In a loop of your own `with dsee_scale.adapters_disabled(model):` is the reference.
"""

from __future__ import annotations

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_start import parse_arguments, usual_settings

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig


def main() -> None:
    args = parse_arguments(__doc__, "prompt, chosen and rejected")
    settings = DPOConfig(**usual_settings(args), precompute_ref_log_probs=True)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    dsee_scale.inject(model, DSEEConfig(rank=16, alpha=32, num_sparse=64))  # (dsee)
    half = PruneConfig(sparsity=0.5, score="WABS", scope="matrix", mask_update=False)
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[DSEECallback(half, at=args.prune_at)],  # (dsee)
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
