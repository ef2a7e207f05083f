"""DSEE in a plain DeepSpeed loop: the five lines marked (dsee) are all that was added.

deepspeed --num_gpus 2 examples/deepspeed_loop.py --model MODEL --text TEXT.txt --output_dir OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
import torch._dynamo
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--text", required=True, help="plain text file to tune on")
    parser.add_argument(
        "--output_dir", required=True, help="empty folder for the adapter and the exported model"
    )
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_cpu.json", help="DeepSpeed JSON")
    parser.add_argument("--steps", type=int, default=20, help="steps before and after pruning")
    parser.add_argument("--block_size", type=int, default=64, help="tokens in a training example")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args()


def deepspeed_config(path: str, learning_rate: float) -> dict:
    """The shipped config with the Trainer's `auto` values filled in."""
    config = json.loads(Path(path).read_text())
    config.update(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, gradient_clipping=1.0)
    config.pop("train_batch_size", None)
    config.pop("scheduler", None)
    config["bf16"] = {"enabled": True}
    config["optimizer"]["params"] = {"lr": learning_rate, "torch_adam": True}
    return config


def main() -> None:
    args = parse_arguments()
    deepspeed.init_distributed()
    ds_config = deepspeed_config(args.deepspeed_config, args.learning_rate)

    hf_ds = HfDeepSpeedConfig(ds_config)  # keep it alive: weights are partitioned while they load
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, trust_remote_code=False)
    report = dsee_scale.inject(model, DSEEConfig(rank=16, alpha=32, num_sparse=64))  # (dsee)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=dsee_scale.trainable_parameters(model),  # (dsee)
        config=ds_config,
    )
    if engine.global_rank == 0:
        print(report)

    blocks = token_blocks(args.text, args.model, args.block_size)
    train(engine, blocks, args.steps)
    pruned = dsee_scale.prune(engine, PruneConfig(sparsity=0.5, score="WABS"))  # (dsee)
    if engine.global_rank == 0:
        print(pruned)
    train(engine, blocks, args.steps)

    dsee_scale.save_adapter(engine, f"{args.output_dir}/adapter")  # (dsee)
    dsee_scale.export_model(engine, f"{args.output_dir}/model", delta="masked")  # (dsee)
    del hf_ds


def token_blocks(text: str, model: str, size: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < size:
        raise SystemExit(
            f"{text} has {len(ids)} tokens, expected at least one block of {size} (--block_size)"
        )
    return ids[: len(ids) // size * size].view(-1, size)


def train(engine: deepspeed.DeepSpeedEngine, blocks: torch.Tensor, steps: int) -> None:
    micro = engine.train_micro_batch_size_per_gpu()
    engine.train()
    for step in range(steps):
        first = (step * engine.world_size + engine.global_rank) * micro
        rows = (first + torch.arange(micro)) % len(blocks)
        batch = blocks[rows].to(engine.device)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
