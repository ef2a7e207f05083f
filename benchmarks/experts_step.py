"""A training step with adapters on experts: PEFT's LoRA by `target_parameters` and dsee_scale, plain and on ZeRO-3.

    python benchmarks/experts_step.py --json

Same mixture of experts with random weights, same rank, dtype, tokens and optimizer on every side; all of the experts'
matrices are adapted, nothing else is. On a GPU in bfloat16; on a CPU in float32, since there PyTorch compiles a kernel
for each number of tokens that an expert gets in bfloat16, which takes longer than the products. PEFT forms W + D of all
experts in every forward and keeps it for backward; here the update is two thin grouped products. Sides of dsee_scale:
`low rank` trains what PEFT trains, `ours` 64 sparse entries in each expert's matrices besides, `shared` has one A for a
layer's experts, and `masked` trains (W + D) * M after half of the weights were pruned. `frozen` is what no adapter on
experts can go below: one projection of the first layer's attention is adapted, so that backward runs through all.

- step time: forward, backward and optimizer step, median over the rounds, slowest rank; the sides step in turn;
- peak memory: the highest point of a few steps beyond what the libraries take, each run in processes of its own.

PEFT's side is None where it does not run; the reason is a key of the case.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before any zero.Init context; see docs/architecture.md
from _ranks import launch, peak_memory
from _report import Report, parser
from _steps import slowest_ranks, step, time_rounds, zero3_config
from torch import nn

SHAPES = {
    "tiny": dict(hidden=256, inner=128, experts=16, layers=4),
    "1B-like": dict(hidden=1024, inner=512, experts=32, layers=3),
}
"""The second has the widths of a 1B mixture of experts (16 such layers), with fewer layers."""
SIDES = ("peft", "low rank", "ours", "shared", "masked", "frozen")
RANK, NUM_SPARSE, VOCAB = 16, 64, 4096
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def build_model(arguments: argparse.Namespace, ds_config: dict[str, Any] | None) -> nn.Module:
    """A Qwen3-MoE; its weights are partitioned if there is a DeepSpeed config."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    shape = SHAPES[arguments.shape]
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        moe_intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64,
        num_key_value_heads=max(1, shape["hidden"] // 256),
        head_dim=64,
        num_experts=shape["experts"],
        num_experts_per_tok=4,
        use_cache=False,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    if ds_config is not None:
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=ds_config, dtype=DTYPE)
    return model.train()


def adapt(model: nn.Module, side: str) -> nn.Module:
    """One of the sides; what is trained has requires_grad, nothing else has."""
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=list(TARGETS), lora_dropout=0.0
        )
        model.enable_input_require_grads()  # without it DeepSpeed's leaf modules lose PEFT's first gradients
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    import dsee_scale

    settings = dsee_scale.DSEEConfig(
        rank=RANK,
        alpha=2 * RANK,
        num_sparse=NUM_SPARSE if side in ("ours", "shared", "masked") else None,
        target_modules=("layers.0.self_attn.q_proj",) if side == "frozen" else TARGETS,
        support="random",
        shared_expert_a=side == "shared",
    )
    dsee_scale.inject(model, settings)
    return model


class Plain:
    """What a step needs of an engine, in one process without DeepSpeed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_engine(side: str, arguments: argparse.Namespace) -> Any:
    """A side, ready to step."""
    ds_config = None
    if arguments.engine == "ZeRO-3":
        ds_config = zero3_config(arguments.batch, DTYPE)
    model = adapt(build_model(arguments, ds_config), side)
    engine: Any = Plain(model)
    if ds_config is not None:
        import deepspeed

        trained = [p for p in model.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config)[0]
    if side == "masked":
        import dsee_scale

        whole = engine if ds_config is not None else model
        dsee_scale.prune(whole, dsee_scale.PruneConfig(sparsity=0.5, score="W", modules=("*.experts.*",)))
    return engine


def time_steps(arguments: argparse.Namespace, tokens: torch.Tensor) -> dict[str, Any]:
    """Wall and processor seconds of each round's step for every side, and why a side does not run."""
    engines, failed = {}, {}
    for side in SIDES:
        try:
            engines[side] = build_engine(side, arguments)
            step(engines[side], tokens)
        except Exception as error:  # other people's code: what it says is the result
            if side != "peft":
                raise
            engines.pop(side, None)
            failed[side] = f"{type(error).__name__}: {error}"[:200]
    return {"times": time_rounds(engines, tokens, arguments.rounds), "failed": failed}


def worker(arguments: argparse.Namespace) -> None:
    """One rank; writes its results to the file that the parent named."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.engine == "ZeRO-3":
        import deepspeed

        deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, VOCAB, (arguments.batch, arguments.length), generator=generator).to(device)
    if arguments.memory_of:
        import peft  # noqa: F401  # both, so that neither side's library counts

        import dsee_scale  # noqa: F401

        result: Any = peak_memory(
            lambda: build_engine(arguments.memory_of, arguments),
            lambda engine: [step(engine, tokens) for _ in range(3)],
        )
    else:
        result = time_steps(arguments, tokens)
    Path(f"{arguments.worker}.{rank}").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch_ranks(arguments: argparse.Namespace, shape: str, engine: str, memory_of: str = "") -> list[Any]:
    """This file once per rank."""
    processes = 1 if engine == "one process" else arguments.processes
    words = ["--shape", shape, "--engine", engine, "--processes", str(processes)]
    words += ["--memory-of", memory_of] if memory_of else []
    for name in ("batch", "length", "rounds"):
        words += [f"--{name}", str(getattr(arguments, name))]
    return launch(__file__, words, processes, 1, for_memory=bool(memory_of))


def report_case(arguments: argparse.Namespace, shape: str, engine: str, report: Report) -> None:
    """Time and memory of one shape under one engine."""
    ranks = launch_ranks(arguments, shape, engine)
    failed = ranks[0]["failed"]
    details = {
        "tokens_per_rank": arguments.batch * arguments.length,
        **({"peft": failed["peft"]} if failed else {}),
    }
    case = f"{engine}, {shape}"
    for metric in ("wall", "cpu"):
        seconds = slowest_ranks([rank["times"] for rank in ranks], metric)
        name = "step time" if metric == "wall" else "step time, processor"
        for side in SIDES[1:]:
            report.add(f"{case}, {side}", name, "s", seconds[side], seconds.get("peft"), **details)
    if arguments.no_memory:
        return
    sides = [side for side in SIDES if side in seconds]
    memory = {side: max(launch_ranks(arguments, shape, engine, memory_of=side)) for side in sides}
    for side in SIDES[1:]:
        report.add(f"{case}, {side}", "peak memory", "B", memory[side], memory.get("peft"), **details)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, help="only this one")
    arguments.add_argument("--engine", choices=("one process", "ZeRO-3"), help="only this one")
    arguments.add_argument("--batch", type=int, default=2, help="sequences per rank")
    arguments.add_argument("--length", type=int, default=256, help="tokens per sequence")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--processes", type=int, default=2, help="ranks under ZeRO-3")
    arguments.add_argument("--no-memory", action="store_true", help="times only")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    arguments.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.worker:
        return worker(arguments)
    if arguments.quick:
        arguments.shape, arguments.rounds, arguments.no_memory = arguments.shape or "tiny", 3, True
    report = Report("experts_step", arguments.json)
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        for engine in [arguments.engine] if arguments.engine else ("one process", "ZeRO-3"):
            report_case(arguments, shape, engine, report)
    return None


if __name__ == "__main__":
    main()
