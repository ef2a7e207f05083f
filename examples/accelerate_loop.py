"""DSEE in a plain Accelerate loop; works under DeepSpeed, DDP or one process, as the launcher says.

accelerate launch --config_file ds_configs/accelerate_cpu.yaml examples/accelerate_loop.py \
    --model MODEL --text TEXT.txt --output_dir OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch._dynamo
from accelerate import Accelerator, PartialState
from accelerate.utils import DummyOptim
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    parser.add_argument("--steps", type=int, default=20, help="steps before and after pruning")
    parser.add_argument("--block_size", type=int, default=64, help="tokens in a training example")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(mixed_precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, trust_remote_code=False)
    accelerator.print(dsee_scale.inject(model, DSEEConfig(rank=16, alpha=32, num_sparse=64)))
    optimizer = make_optimizer(accelerator, dsee_scale.trainable_parameters(model), args.learning_rate)
    loader = DataLoader(token_blocks(args.text, args.model, args.block_size), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    train(accelerator, model, optimizer, loader, args.steps)
    accelerator.print(dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="WABS")))
    train(accelerator, model, optimizer, loader, args.steps)

    dsee_scale.save_adapter(model, f"{args.output_dir}/adapter")
    dsee_scale.export_model(model, f"{args.output_dir}/model", delta="masked")


def make_optimizer(
    accelerator: Accelerator, params: list[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer | DummyOptim:
    """AdamW; a placeholder where the DeepSpeed JSON names an optimizer, which Accelerate then asks for."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or "optimizer" not in plugin.deepspeed_config:
        optimizer = torch.optim.AdamW(params, lr=learning_rate)
        if plugin is None:  # DeepSpeed keeps float32 master weights itself
            dsee_scale.keep_masters(optimizer)
        return optimizer
    settings = plugin.deepspeed_config["optimizer"]["params"]
    settings.update(betas=[0.9, 0.999], eps=1e-8)  # Accelerate fills in `auto` for lr and weight_decay alone
    plugin.deepspeed_config.pop("train_batch_size", None)  # DeepSpeed computes it
    return DummyOptim(params, lr=learning_rate, weight_decay=0.0)


def token_blocks(text: str, model: str, size: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    if len(ids) < size:
        raise SystemExit(
            f"{text} has {len(ids)} tokens, expected at least one block of {size} (--block_size)"
        )
    return ids[: len(ids) // size * size].view(-1, size)


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    steps: int,
) -> None:
    model.train()
    step = 0
    while step < steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            step += 1
            if step == steps:
                return


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # last: gloo's threads may abort a process that still holds an engine
