"""TRL's SFTTrainer, unmodified: tune, prune and retune by the three lines marked (dsee).

deepspeed --num_gpus 2 examples/trl_sft.py --model MODEL --data ROWS.jsonl --output_dir OUT

ROWS.jsonl holds lines with `prompt` and `completion`. Add --resume to go on from the last checkpoint.
"""

from __future__ import annotations

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer
from trl_start import parse_arguments, usual_settings

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig


def main() -> None:
    args = parse_arguments(__doc__, "prompt and completion")
    settings = SFTConfig(**usual_settings(args))
    checkpoint = get_last_checkpoint(args.output_dir) if args.resume else None
    # After a re-fit the training goes on from the base that it left.
    base = dsee_scale.base_of(checkpoint, args.model) if checkpoint else args.model
    model = AutoModelForCausalLM.from_pretrained(base)
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
    model_folder = f"{args.output_dir}/model"
    report = dsee_scale.export_model(trainer.model_wrapped, model_folder, overwrite=True)  # (dsee)
    if trainer.is_world_process_zero():
        print(report)


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
