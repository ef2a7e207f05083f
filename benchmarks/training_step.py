"""A training step under real DeepSpeed ZeRO-3: PEFT's LoRA, dsee_scale before and after a prune, the frozen model.

    python benchmarks/training_step.py --json

Same model, targets, rank, dtype and data on every side; dsee_scale trains 64 sparse entries a matrix
besides. "Under the mask" is dsee_scale after half of the weights were pruned: the step then trains (W + D) * M.
The model has the shape of SmolLM2-135M (30 layers, hidden 576) with random weights and a small vocabulary, so
that the blocks and not the logits are timed. All engines live in the same processes and step in turn, so that
a busy machine slows them alike.

- added: what a side adds to the frozen model's step, ours over PEFT's;
- time: forward, backward and optimizer step, median over the rounds, slowest rank, for few and for many tokens:
  the more tokens, the more of a step is the frozen model's arithmetic, which is the same on every side;
- cpu: processor time of a step on one rank, without waiting for others;
- memory: the highest point of a few steps beyond what the libraries take, median of runs in processes of their own;
- fetches: modules that ZeRO-3 fetches in a step.

The frozen side trains one norm's weight and sends gradients down to the embeddings, so it shows the cost
of the frozen model alone; it has the input gradient of the very first projections on top of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before any zero.Init context; see docs/architecture.md
from _gpu_report import GpuReport, report_step
from _ranks import launch, peak_memory, small_llama
from _report import Report, parser
from _steps import slowest_ranks, step, time_rounds, zero3_config
from torch import nn

TARGETS = {
    "q and v": ("q_proj", "v_proj"),
    "all linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
SIDES = ("peft", "ours", "masked", "frozen")
RANK, NUM_SPARSE = 16, 64


def build_model(arguments: argparse.Namespace, ds_config: dict[str, Any]) -> nn.Module:
    """A Llama whose weights are partitioned while it is made."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    config = small_llama(arguments.hidden, arguments.layers)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def adapt(model: nn.Module, side: str, targets: tuple[str, ...]) -> nn.Module:
    """One of the sides; what is trained has requires_grad, nothing else has."""
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets), lora_dropout=0.0)
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    if side in ("ours", "masked"):
        import dsee_scale

        settings = dict(rank=RANK, alpha=2 * RANK, num_sparse=NUM_SPARSE, target_modules=targets)
        dsee_scale.inject(model, dsee_scale.DSEEConfig(support="random", **settings))
        return model
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def build_engine(side: str, targets: tuple[str, ...], arguments: argparse.Namespace) -> Any:
    """A DeepSpeed engine with an optimizer over what is trained."""
    import deepspeed

    threshold = {"stage3_param_persistence_threshold": arguments.threshold}
    ds_config = zero3_config(arguments.batch, torch.bfloat16, **threshold)
    model = adapt(build_model(arguments, ds_config), side, targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config)[0]
    if side == "masked":
        import dsee_scale

        dsee_scale.prune(engine, dsee_scale.PruneConfig(sparsity=0.5, score="W", modules=targets))
    return engine


def time_steps(
    arguments: argparse.Namespace, targets: tuple[str, ...], batches: dict[int, torch.Tensor]
) -> dict[str, Any]:
    """By number of tokens: seconds of each round's steps for every side; and the fetches of one step."""
    engines = {side: build_engine(side, targets, arguments) for side in arguments.sides}
    longest = batches[max(batches)]
    for engine in engines.values():
        for _ in range(3):
            step(engine, longest)
    fetches = {side: count_fetches(engine, longest) for side, engine in engines.items()}
    times = {}
    for tokens in batches.values():
        for engine in engines.values():
            step(engine, tokens)
        times[tokens.numel()] = time_rounds(engines, tokens, arguments.rounds)
    return {"times": times, "fetches": fetches}


def count_fetches(engine: Any, tokens: torch.Tensor) -> int:
    """Calls of ZeRO-3's fetch_sub_module in one step, forward and backward."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    original, count = Coordinator.fetch_sub_module, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    Coordinator.fetch_sub_module = counted
    try:
        step(engine, tokens)
    finally:
        Coordinator.fetch_sub_module = original
    return count


def run_steps(engine: Any, tokens: torch.Tensor) -> None:
    for _ in range(3):
        step(engine, tokens)


def worker(arguments: argparse.Namespace) -> None:
    """One rank; writes its results to the file that the parent named."""
    import deepspeed

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(arguments.threads)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    rank = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(rank)
    device = "cuda" if on_gpu else "cpu"
    batches = {
        n: torch.randint(0, 4096, (arguments.batch, n), generator=generator).to(device)
        for n in arguments.lengths
    }
    targets = TARGETS[arguments.targets]
    if arguments.memory_of:
        import peft  # noqa: F401  # both, so that neither side's library counts

        import dsee_scale  # noqa: F401

        result: Any = peak_memory(
            lambda: build_engine(arguments.memory_of, targets, arguments),
            lambda engine: run_steps(engine, batches[max(batches)]),
        )
    else:
        result = time_steps(arguments, targets, batches)
    Path(f"{arguments.worker}.{rank}").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def launch_ranks(arguments: argparse.Namespace, targets: str, memory_of: str = "") -> list[Any]:
    """This file once per rank."""
    words = ["--targets", targets, *(["--memory-of", memory_of] if memory_of else [])]
    for name in ("hidden", "layers", "batch", "threshold", "rounds", "threads"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--lengths", *map(str, arguments.lengths), "--sides", *arguments.sides]
    words += ["--checkpointing"] if arguments.checkpointing else []
    return launch(__file__, words, arguments.processes, arguments.threads, for_memory=bool(memory_of))


def report_times(arguments: argparse.Namespace, targets: str, report: Report, ranks: list[Any]) -> None:
    """Time and processor time of every number of tokens."""
    for tokens in ranks[0]["times"]:
        case = f"ZeRO-3, {targets}, {tokens} tokens a rank"
        for metric, suffix in (("wall", ""), ("cpu", ", processor")):
            medians = slowest_ranks([rank["times"][tokens] for rank in ranks], metric)
            ours, peft, frozen = medians["ours"], medians["peft"], medians["frozen"]
            details = {"frozen": frozen, "peft_over_frozen": peft / frozen}
            if arguments.floors and metric == "wall":
                config = small_llama(arguments.hidden, arguments.layers)
                shape = arguments.batch, int(tokens) // arguments.batch
                lines = GpuReport("gpu", model=f"{arguments.layers} x {arguments.hidden}", **report.always)
                report_step(lines, case, medians, config, TARGETS[targets], RANK, *shape)
                continue
            report.add(case, f"step time{suffix}", "s", ours, peft, **details)
            report.add(case, f"added over frozen{suffix}", "s", ours - frozen, peft - frozen)
            if "masked" in medians:
                masked = f"{case}, under the mask"
                report.add(masked, f"step time{suffix}", "s", medians["masked"], peft, **details)


def report_case(arguments: argparse.Namespace, targets: str, report: Report) -> None:
    """Time, processor time, fetches and memory of one set of targets."""
    ranks = launch_ranks(arguments, targets)
    report_times(arguments, targets, report, ranks)
    fetches = ranks[0]["fetches"]
    report.add(
        f"ZeRO-3, {targets}", "fetches", "1", fetches["ours"], fetches["peft"], frozen=fetches["frozen"]
    )
    if arguments.no_memory:
        return
    runs = 1 if arguments.quick else 3
    memory = {
        side: statistics.median(max(launch_ranks(arguments, targets, memory_of=side)) for _ in range(runs))
        for side in ("ours", "peft", "masked")
    }
    report.add(f"ZeRO-3, {targets}", "peak memory", "B", memory["ours"], memory["peft"])
    report.add(f"ZeRO-3, {targets}, under the mask", "peak memory", "B", memory["masked"], memory["peft"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--hidden", type=int, default=576)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--batch", type=int, default=2, help="sequences per rank")
    arguments.add_argument(
        "--lengths", type=int, nargs="+", default=[32, 256, 1024], help="tokens per sequence"
    )
    arguments.add_argument(
        "--threshold", type=int, default=100_000, help="stage3_param_persistence_threshold"
    )
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1, help="per process, on CPU")
    arguments.add_argument(
        "--processes", type=int, default=max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    )
    arguments.add_argument("--no-memory", action="store_true", help="times only")
    arguments.add_argument(
        "--floors", action="store_true", help="beside each step what the GPU can't be faster than"
    )
    arguments.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    arguments.add_argument(
        "--sides", choices=SIDES, nargs="+", default=SIDES, help="leave `masked` out, if any"
    )
    arguments.add_argument("--targets", choices=TARGETS, help="only these")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    arguments.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if missing := {"peft", "ours", "frozen"}.difference(arguments.sides):
        raise SystemExit(f"--sides: `masked` alone can be left out; missing: {', '.join(sorted(missing))}")
    if arguments.worker:
        return worker(arguments)
    if arguments.quick:
        arguments.layers, arguments.lengths, arguments.rounds = 4, [32], 5
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = Report("training_step", arguments.json, device=device, blocks=arguments.layers)
    for targets in [arguments.targets] if arguments.targets else TARGETS:
        report_case(arguments, targets, report)
    return None


if __name__ == "__main__":
    main()
