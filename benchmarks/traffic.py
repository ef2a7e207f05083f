"""Bytes that a training step moves and memory that it leaves occupied, against docs/clusters.md's formulas.

    python benchmarks/traffic.py [--quick] [--json]

Every collective of a real DeepSpeed engine is counted on the first rank: an all-gather over n ranks brings a
rank (n - 1)/n of the gathered tensor, a reduce-scatter the same of the scattered one, an all-reduce both.
`ours` is what was measured, `peer` what the formula says: a ratio of 1 means that the formula is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before any zero.Init context; see docs/architecture.md
from _ranks import free_port
from _report import Report, parser

RANK, NUM_SPARSE, STEPS = 4, 64, 2
THRESHOLD = 12_000
"""Persistence threshold of the small model here: above its adapters, below its matrices."""
BUCKET = 100_000
"""Gradients that are reduced at once; the buffer for them stays."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a model with adapters."""

    sharded: int
    """Frozen, above the persistence threshold."""
    embedding: int
    """Those of `sharded` that only the forward pass reads: the input embedding, where it is not tied."""
    block: int
    """Those of `sharded` in one block."""
    last: int
    """Those of a block's last matrix."""
    num_blocks: int
    """Blocks of the model."""
    resident: int
    """Frozen, below the threshold: norms and biases."""
    trained: int
    """A, B and sparse values."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One case."""

    stage: int = 3
    world: int = 2
    micro_steps: int = 1
    checkpointing: bool = False
    node: int = 0
    """Ranks of one machine under hierarchical partitioning; 0 without."""


CASES = {
    "ZeRO-3, 2 ranks": Setting(),
    "ZeRO-3, 2 ranks, 4 micro-steps": Setting(micro_steps=4),
    "ZeRO-3, 2 ranks, checkpointing": Setting(checkpointing=True),
    "ZeRO-2, 2 ranks, 4 micro-steps": Setting(stage=2, micro_steps=4),
    "ZeRO-3, 4 ranks": Setting(world=4),
    "hpZ, 4 ranks as 2 machines of 2": Setting(world=4, node=2),
}
QUICK = list(CASES)[:3]


def predicted_traffic(sizes: Sizes, setting: Setting, weight_bytes: int = 2) -> dict[str, float]:
    """Bytes that a rank receives in one optimizer step: `weights`, `adapters`, and `between` machines."""
    share = (setting.world - 1) / setting.world
    # ZeRO-2 sums fp32 gradients by all-reduce, ZeRO-3 by reduce-scatter.
    gradients = (4 if setting.stage == 3 else 8) * sizes.trained * setting.micro_steps
    updated = weight_bytes * sizes.trained
    if setting.stage == 3:
        updated += weight_bytes * sizes.resident
    weights = share * weight_bytes * fetched(sizes, setting)
    adapters = share * (gradients + updated)
    between = weights + adapters
    if setting.node:
        # Frozen weights come from the machine's own copy; only adapters cross.
        weights *= (setting.node - 1) / setting.node / share
        between = adapters
    return {"weights": weights, "adapters": adapters, "between": between}


def fetched(sizes: Sizes, setting: Setting) -> int:
    """Frozen weights fetched in one optimizer step."""
    if setting.stage < 3:
        return 0
    if not setting.checkpointing:
        return (2 * sizes.sharded - sizes.embedding) * setting.micro_steps
    # The recomputation of a block ends with its last matrix, whose backward follows at once. Blocks must pass
    # gradients to their inputs, and so the embedding is asked for again too.
    recomputed = sizes.num_blocks * (sizes.block - sizes.last)
    return (2 * sizes.sharded + recomputed) * setting.micro_steps


def predicted_memory(sizes: Sizes, setting: Setting, weight_bytes: int = 2) -> float:
    """Bytes that stay occupied on a rank between two steps."""
    frozen = sizes.sharded + sizes.resident
    # Master copy, two moments and accumulated gradient, each in fp32.
    optimizer = 16 * sizes.trained / setting.world + 4 * BUCKET
    if setting.stage < 3:
        return weight_bytes * (frozen + sizes.trained) + optimizer
    held = weight_bytes * (frozen + sizes.trained) / setting.world
    held += weight_bytes * (sizes.resident + sizes.trained)
    if setting.node:
        held += weight_bytes * frozen / setting.node
    return held + optimizer


def counter(node: int) -> Any:
    """A context that adds up, in `received`, the bytes that this rank receives, by kind of collective.

    Collectives of groups that reach over several machines of `node` ranks are counted in `between` too.
    """
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    rounds = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_": 1, "reduce_scatter_": 1}
    rounds |= {"allreduce_": 2, "reduce_": 1, "broadcast_": 1}
    larger = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allgather_": 0, "reduce_scatter_": 1}

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.received: Counter[str] = Counter()
            self.between = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("c10d::")
            if func.namespace == "c10d" and name in rounds:
                self.add(name, args)
            elif func.namespace == "c10d":
                self.received[f"unknown {name}"] += 1
            return func(*args, **(kwargs or {}))

        def add(self, name: str, args: Any) -> None:
            boxed = [a for a in args if isinstance(a, torch.ScriptObject)]
            group = dist.ProcessGroup.unbox(next(a for a in boxed if "ProcessGroup" in str(a._type())))
            ranks = dist.get_process_group_ranks(group)
            size = sum(t.numel() * t.element_size() for t in flat(args[larger.get(name, 0)]))
            moved = rounds[name] * size * (len(ranks) - 1) / len(ranks)
            self.received[name] += moved
            if node and len({rank // node for rank in ranks}) > 1:
                self.between += moved

    return Count()


def flat(value: Any) -> list[torch.Tensor]:
    """Tensors in nested lists."""
    return [value] if isinstance(value, torch.Tensor) else [t for each in value for t in flat(each)]


def build_engine(setting: Setting) -> tuple[Any, Sizes]:
    """A Llama of 6 layers with adapters on every linear layer, in bf16."""
    import deepspeed
    from transformers import AutoModelForCausalLM, LlamaConfig

    import dsee_scale

    zero = {"stage": setting.stage, "reduce_bucket_size": BUCKET}
    if setting.stage == 3:
        zero |= {"stage3_param_persistence_threshold": THRESHOLD, "stage3_prefetch_bucket_size": 0}
        zero |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 0}
    if setting.node:
        zero["zero_hpz_partition_size"] = setting.node
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.micro_steps,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    shape = dict(vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=6)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, use_cache=False, tie_word_embeddings=False)
    config = LlamaConfig(**shape, **heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if setting.stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=ds_config, dtype=torch.bfloat16)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    settings = dict(rank=RANK, num_sparse=NUM_SPARSE, support="random", target_modules=targets)
    dsee_scale.inject(model, dsee_scale.DSEEConfig(**settings))
    trained = dsee_scale.trainable_parameters(model)
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config)[0]
    return engine, count_sizes(engine.module)


def count_sizes(model: Any) -> Sizes:
    """The model's numbers of parameters, by what happens to them."""
    embedding = model.get_input_embeddings().weight
    counts = Counter()
    for param in model.parameters():
        size = getattr(param, "ds_numel", param.numel())
        kind = "trained" if param.requires_grad else "sharded" if size > THRESHOLD else "resident"
        counts[kind] += size
    shapes = [
        getattr(p, "ds_shape", p.shape) for p in model.model.layers[0].parameters() if not p.requires_grad
    ]
    block = sum(shape.numel() for shape in shapes if shape.numel() > THRESHOLD)
    num_blocks = len(model.model.layers)
    embedded = getattr(embedding, "ds_numel", embedding.numel())
    last = model.config.hidden_size * model.config.intermediate_size
    return Sizes(**counts, embedding=embedded, block=block, last=last, num_blocks=num_blocks)


def occupied() -> int:
    """Bytes of all tensors that exist in this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(setting: Setting) -> dict[str, Any]:
    """On one rank: sizes, bytes received per optimizer step, bytes occupied between steps."""
    before = occupied()
    engine, sizes = build_engine(setting)
    tokens = torch.randint(0, 1024, (1, 16), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        for _ in range(setting.micro_steps):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    for _ in range(3):  # DeepSpeed learns the order of the modules in the first ones
        step()
    with counter(setting.node) as counts:
        for _ in range(STEPS):
            step()
    received = {name: moved / STEPS for name, moved in counts.received.items()}
    received["between"] = counts.between / STEPS
    return {"sizes": dataclasses.asdict(sizes), "received": received, "occupied": occupied() - before}


def launch(setting: Setting) -> dict[str, Any]:
    """Run this file once per rank and return what the first rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        port, result = free_port(), Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(setting)), str(result)]
        processes = []
        for rank in range(setting.world):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.world, "MASTER_PORT": port}
            env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
            env["PYTHONWARNINGS"] = "ignore"
            env = os.environ | {key: str(value) for key, value in env.items()}
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
        if any([process.wait() for process in processes]):
            raise SystemExit("a rank failed; its message is above")
        return json.loads(result.read_text())


def worker(setting: Setting, result: str) -> None:
    """One rank; the first one writes its numbers."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    found = measure(setting)
    if torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main(arguments: argparse.Namespace) -> None:
    report = Report("traffic", arguments.json)
    for name in [name for name in (QUICK if arguments.quick else CASES) if arguments.case in name]:
        setting = CASES[name]
        found = launch(setting)
        sizes, received = Sizes(**found["sizes"]), found["received"]
        expected = predicted_traffic(sizes, setting)
        total = sum(moved for kind, moved in received.items() if kind != "between")
        details = {"received": received, **found["sizes"]}
        report.add(name, "received", "B/step", total, expected["weights"] + expected["adapters"], **details)
        if setting.node:
            report.add(name, "between machines", "B/step", received["between"], expected["between"])
        report.add(name, "occupied", "B", found["occupied"], predicted_memory(sizes, setting))


if __name__ == "__main__":
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--case", default="", help="only cases whose name holds this")
    arguments_parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parsed = arguments_parser.parse_args()
    if parsed.worker:
        worker(Setting(**json.loads(parsed.worker[0])), parsed.worker[1])
    else:
        main(parsed)
