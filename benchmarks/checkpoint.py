"""Saving and loading a training state, against DeepSpeed's own checkpoint of the same engine.

    python benchmarks/checkpoint.py [--quick] [--json]

One engine under ZeRO-3 on two ranks, tuned and pruned; both ways in turn, in the same processes, on the same
disk. `without frozen` is DeepSpeed's `exclude_frozen_parameters=True`, from which pruned weights cannot be
restored. Ours hashes every file and flushes it to the disk, in a thread beside the next training step; DeepSpeed
does neither, and `flushed` adds that to its side. Our ways to save and load:

- save: what training waits for, before and after the step beside which the files are finished;
- save, added to training: the same, and what that step takes longer;
- save, until it is whole: without a step in between;
- save after a pruning: the same, with the masks written anew;
- load: into an engine whose weights have the checkpoint's masks from `load_adapter`, as in a resumed run;
- load, masks applied: into one that lacks them;
- one pass over the weights: reading and writing those that are masked, once, without which no mask is applied.

Sizes are compared with

    adapter + 4 bytes x (1 + moments) x trained parameters + pruned weights / 8.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import Report, parser
from scale import SHAPES, run_on
from scale import build as build_random

RANK, NUM_SPARSE = 16, 64
MOMENTS = 2
TOKENS = 64
OURS = (
    "save",
    "save, added to training",
    "save, until it is whole",
    "save after a pruning",
    "load",
    "load, masks applied",
    "one pass over the weights",
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--model",
        help="folder of a decoder, or a random Llama (7b, 1b, small); default: SmolLM2 as `make demo` fetches it",
    )
    arguments.add_argument("--folder", help="where to write (default: the temporary folder)")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    report = Report("checkpoint", args.json)
    model, case = choose_model(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ranks = run_on(2, measure, model, folder, 2 if args.quick else args.rounds)
    seconds = {
        key: statistics.median(max(r["seconds"][key][i] for r in ranks) for i in range(len(times)))
        for key, times in ranks[0]["seconds"].items()
    }
    sizes, counts = ranks[0]["sizes"], ranks[0]["counts"]
    seconds["ours save, added to training"] = seconds["step and save"] - seconds["step"]
    for what in OURS:
        peer = seconds["deepspeed save" if what.startswith("save") else "deepspeed load"]
        report.add(case, what, "s", seconds[f"ours {what}"], peer, step=seconds["step"])
    report.add(f"{case}, flushed", "save", "s", seconds["ours save"], seconds["deepspeed flushed save"])
    report.add(f"{case}, without frozen", "save", "s", seconds["ours save"], seconds["without frozen save"])
    report.add(case, "size", "B", sizes["ours"], sizes["deepspeed"], **counts)
    report.add(f"{case}, without frozen", "size", "B", sizes["ours"], sizes["without frozen"])
    report.add(case, "size against the formula", "B", sizes["ours"], predicted_size(**counts))
    trained = 32 * 2 * (RANK * (4096 + 4096) + NUM_SPARSE)
    large = predicted_size(trained=trained, pruned=6_476_005_376, sparse=64 * NUM_SPARSE)
    report.add("Llama-2-7B, q and v, half pruned", "size by the formula", "B", large)


def choose_model(args: argparse.Namespace) -> tuple[str, str]:
    """A folder ("" for a small random Llama) and what to call it."""
    from dsee_scale.recipe.parsing import cache_folder

    if args.model in SHAPES:
        return args.model, f"random Llama, {args.model}, 2 ranks"
    folder = Path(args.model) if args.model else cache_folder() / "smollm2-135m-instruct"
    if args.quick and not args.model:
        return "", "Llama of 6 layers, 2 ranks"
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist; python examples/demo/demo_inputs.py fetches SmolLM2")
    return str(folder), f"{folder.name}, 2 ranks"


def predicted_size(*, trained: int, pruned: int, sparse: int, weight_bytes: int = 2) -> int:
    """Bytes of a training state.

    Args:
        trained: parameters of adapters.
        pruned: entries of pruned weights, one bit each.
        sparse: entries of S2, whose row and column (4 bytes each) are stored besides.
        weight_bytes: of an adapter's dtype.
    """
    return weight_bytes * trained + 8 * sparse + 4 * (1 + MOMENTS) * trained + pruned // 8


def measure(model: str, folder: str, rounds: int) -> dict[str, Any]:
    """Collective. Seconds of every round, bytes on disk, and what they hold."""
    from dsee_scale.adapters.state import model_state
    from dsee_scale.checkpoint.training_state import (
        load_training_state,
        save_training_state,
        start_training_state,
    )
    from dsee_scale.partition import open_partition

    engine, counts = build_engine(model)
    ours, whole, partial = (f"{folder}/{name}" for name in ("ours", "deepspeed", "partial"))
    waits: list[float] = []

    def save_beside_a_step() -> None:
        started = time.perf_counter()
        unfinished = start_training_state(engine, ours, overwrite=True)
        stepping = time.perf_counter()
        step(engine)
        stepped = time.perf_counter()
        unfinished.finish()
        waits.append(stepping - started + time.perf_counter() - stepped)

    def forget_masks() -> None:
        model_state(engine.module).masks = None

    weights = [p for name, p in engine.module.named_parameters() if name in model_state(engine.module).pruned]
    partition = open_partition(engine)

    def pass_over_weights() -> None:
        for weight in weights:
            partition.shard(weight).data.view(torch.int16).mul_(1)

    def as_before_a_pruning() -> None:
        forget_masks()
        model_state(engine.module).pruned.clear()

    ways = {
        "ours save after a pruning": lambda: (
            forget_masks(),
            save_training_state(engine, ours, overwrite=True),
        ),
        "ours save, until it is whole": lambda: save_training_state(engine, ours, overwrite=True),
        "step": lambda: step(engine),
        "step and save": save_beside_a_step,
        "ours load": lambda: load_training_state(engine, ours),
        "ours load, masks applied": lambda: (as_before_a_pruning(), load_training_state(engine, ours)),
        "ours one pass over the weights": pass_over_weights,
        "deepspeed save": lambda: engine.save_checkpoint(whole, tag="step"),
        "deepspeed flushed save": lambda: (engine.save_checkpoint(whole, tag="step"), flush(whole)),
        "deepspeed load": lambda: engine.load_checkpoint(whole, tag="step"),
        "without frozen save": lambda: engine.save_checkpoint(
            partial, tag="step", exclude_frozen_parameters=True
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            with timed(seconds[name], counts=number > 0):
                way()
    seconds["ours save"] = waits[1:]
    sizes = {
        name: folder_size(path)
        for name, path in zip(("ours", "deepspeed", "without frozen"), (ours, whole, partial), strict=True)
    }
    return {"seconds": seconds, "sizes": sizes, "counts": counts}


def build_engine(model: str) -> tuple[Any, dict[str, int]]:
    """Collective. An engine after two steps, half of its block weights zero."""
    import deepspeed
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.integrations import HfDeepSpeedConfig

    import dsee_scale

    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30_000},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if model in SHAPES:
        base = build_random(model)
    elif model:
        keep = HfDeepSpeedConfig(ds_config)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        del keep
    else:
        shape = dict(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=6)
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **shape)
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = ("q_proj", "v_proj")
    settings = dict(rank=RANK, num_sparse=NUM_SPARSE, support="magnitude", target_modules=targets)
    dsee_scale.inject(base, dsee_scale.DSEEConfig(**settings))
    parameters = dsee_scale.trainable_parameters(base)
    engine = deepspeed.initialize(model=base, model_parameters=parameters, config=ds_config)[0]
    for _ in range(2):
        step(engine)
    pruned = dsee_scale.prune(engine, dsee_scale.PruneConfig(sparsity=0.5, score="W"))
    trained = sum(p.ds_numel for p in parameters)
    num_matrices = sum(name.endswith(("q_proj", "v_proj")) for name, _ in base.named_modules())
    return engine, {"trained": trained, "pruned": pruned.total, "sparse": num_matrices * NUM_SPARSE}


def step(engine: Any) -> None:
    """Collective. One training step of few tokens."""
    tokens = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


@contextlib.contextmanager
def timed(into: list[float], *, counts: bool) -> Iterator[None]:
    """Collective. Seconds from when all ranks begin until this one has ended."""
    torch.distributed.barrier()
    started = time.perf_counter()
    yield
    if counts:
        into.append(time.perf_counter() - started)


def flush(path: str) -> None:
    """Collective. Every file below a folder onto the disk, shared by the ranks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    for file in files[rank::world_size]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    torch.distributed.barrier()


def folder_size(path: str) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
