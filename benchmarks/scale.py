"""Supports and an exact global mask for a decoder that no rank holds, under real DeepSpeed ZeRO-3.

Builds a Llama of 6.7 billion parameters with random bf16 weights under zero.Init on two ranks of one
thread each, chooses supports for all q and v matrices, and removes half of all block weights. Prints the
times, and each rank's peak resident memory beyond its shard, the interpreter and its libraries included.
Then decomposes a smaller model on one and on two ranks: how the time falls with the ranks.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
import torch.multiprocessing as mp
from _ranks import PeakMemory, free_port
from _report import Report, parser

SHAPES = {
    # name: layers, hidden, intermediate, heads, vocabulary
    "7b": (32, 4096, 11008, 32, 32000),
    "3.4b": (16, 4096, 11008, 32, 32000),
    "1.7b": (32, 2048, 5632, 16, 32000),
    "1b": (16, 2048, 5632, 16, 32000),
    "small": (6, 1024, 2816, 16, 8000),
}

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=list(SHAPES), help="default: 7b, with --quick small")
    arguments.add_argument("--ranks", type=int, default=2)
    args = arguments.parse_args()
    shape = args.shape or ("small" if args.quick else "7b")
    report = Report("scale", args.json)
    measure_large(report, shape, args.ranks)
    measure_ranks(report, "small" if args.quick else "1b", repeats=1 if args.quick else 3)


def measure_large(report: Report, shape: str, ranks: int) -> None:
    results = run_on(ranks, decompose_and_prune, shape)
    case = f"{shape}, {ranks} ranks"
    first = results[0]
    report.add(case, "parameters", "", first["parameters"])
    for metric in ("build", "supports of q and v", "exact 50% mask"):
        report.add(case, metric, "s", max(r[metric] for r in results))
    report.add(case, "block weights", "", first["block weights"])
    report.add(case, "zeros", "", first["zeros"])
    worst = max(results, key=lambda r: r["peak"] - r["shard"])
    report.add(case, "shard per rank", "GiB", worst["shard"] / 2**30)
    report.add(case, "peak resident beyond shard", "GiB", (worst["peak"] - worst["shard"]) / 2**30)


def measure_ranks(report: Report, shape: str, repeats: int) -> None:
    times = {
        ranks: max(r["seconds"] for r in run_on(ranks, decompose_only, shape, repeats)) for ranks in (1, 2)
    }
    report.add(f"{shape}, all linear layers", "decomposition, 2 ranks against 1", "s", times[2], times[1])


def decompose_and_prune(shape: str) -> dict[str, Any]:
    import dsee_scale
    from dsee_scale import DSEEConfig, PruneConfig
    from dsee_scale.partition import open_partition

    started = time.perf_counter()
    model = build(shape)
    result: dict[str, Any] = {"build": time.perf_counter() - started}
    port = open_partition(model)
    shards = [port.shard(p).data for p in model.parameters()]
    result["shard"] = sum(s.numel() * s.element_size() for s in shards)
    result["parameters"] = sum(port.shape(p).numel() for p in model.parameters())
    with PeakMemory() as memory:
        report = dsee_scale.inject(model, DSEEConfig(rank=16, num_sparse=64))
        pruned = dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    result["supports of q and v"] = report.seconds
    result["exact 50% mask"] = pruned.seconds
    result["block weights"] = pruned.total
    result["zeros"] = pruned.removed
    result["peak"] = memory.peak
    return result


def decompose_only(shape: str, repeats: int) -> dict[str, Any]:
    from dsee_scale import DSEEConfig
    from dsee_scale.adapters.targets import find_targets
    from dsee_scale.partition import open_partition
    from dsee_scale.passes.decompose_model import decompose_model

    model = build(shape)
    port = open_partition(model)
    config = DSEEConfig(num_sparse=64, target_modules=("*.self_attn.*", "*.mlp.*"))
    targets = find_targets(model, config, port.shape)
    times = []
    for _ in range(repeats + 1):
        port.sum_over_ranks(torch.ones(1)).item()  # waits for every rank
        started = time.perf_counter()
        decompose_model(targets, config, port)
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times[1:])}


def build(shape: str, blocks: int | None = None) -> torch.nn.Module:
    """A Llama of random weights, created partitioned; each rank fills its own shards."""
    import deepspeed
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    from dsee_scale.partition import open_partition

    layers, hidden, intermediate, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=blocks or layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
    )
    with deepspeed.zero.Init(config_dict_or_path=DS_CONFIG, dtype=torch.bfloat16), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    port = open_partition(model)
    generator = torch.Generator().manual_seed(port.rank)
    for param in model.parameters():
        port.shard(param).data.normal_(std=0.02, generator=generator)
    return model


def runnable(model: torch.nn.Module) -> Any:
    """Collective. An engine without an optimizer, whose forward passes fetch the weights."""
    import deepspeed

    return deepspeed.initialize(model=model, config=DS_CONFIG)[0]


def run_on(ranks: int, task: Any, *args: Any) -> list[dict[str, Any]]:
    """Run a task on so many fresh processes with DeepSpeed on gloo; their results by rank."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    mp.start_processes(
        _worker, (ranks, free_port(), queue, task, args), nprocs=ranks, join=True, start_method="spawn"
    )
    results = dict(queue.get() for _ in range(ranks))
    return [results[rank] for rank in range(ranks)]


def _worker(rank: int, ranks: int, port: int, queue: Any, task: Any, args: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # DeepSpeed prints on stdout, where the parent prints its lines
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    import torch._dynamo  # before any zero.Init

    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    queue.put((rank, task(*args)))


if __name__ == "__main__":
    main()
