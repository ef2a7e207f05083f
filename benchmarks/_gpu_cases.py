"""The cases of benchmarks/gpu.py, each run as `_gpu_cases.py --case NAME`; on a GPU, or with --tiny anywhere."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # before any zero.Init context
from _floors import floor, frozen_flops, residual_bytes
from _gpu_report import GOALS, GpuReport, report_step
from _ranks import peak_memory
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
RANK, NUM_SPARSE = 16, 64
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"q and v": ("q_proj", "v_proj"), "all linear": ALL}
SHAPES = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "tiny": (64, 128, 2, 4, 2, 128),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--case", choices=CASES, nargs="+", required=True)
    arguments.add_argument("--model", choices=SHAPES, default="7b")
    arguments.add_argument("--layers", type=int, help="blocks, in place of the model's")
    arguments.add_argument("--tiny", action="store_true")
    chosen = arguments.parse_args()
    if chosen.tiny:
        chosen.model, chosen.layers = "tiny", None
    elif not ON_GPU:
        raise SystemExit("no GPU is here; --tiny runs the case's form on the CPU")
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    for case in chosen.case:
        CASES[case](GpuReport("gpu", device=device, model=chosen.model), chosen)


def config_of(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    hidden, width, layers, heads, kv_heads, vocabulary = SHAPES[options.model]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )


def build(options: argparse.Namespace) -> nn.Module:
    """Random weights, frozen, made where they are used."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config_of(options), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def seconds(run: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median time of a call, until the device is done with it."""
    times = []
    for _ in range(warm_up + repeats):
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:])


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def batch_of(config: Any, sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (sequences, length), generator=generator).to(DEVICE)


def adapter_config(targets: tuple[str, ...], **settings: Any) -> Any:
    import dsee_scale

    own = dict(rank=RANK, alpha=2 * RANK, num_sparse=NUM_SPARSE, target_modules=targets, support="random")
    return dsee_scale.DSEEConfig(**{**own, **settings})


# Training step


def side_of(side: str, base: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    """One way to train a model; the frozen weights are shared, but for those that are pruned."""
    import dsee_scale

    shared = {} if side == "masked" else {id(p): p for p in base.parameters()}
    model = copy.deepcopy(base, shared).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets), lora_dropout=0.0)
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    if side == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
        return model
    dsee_scale.inject(model, adapter_config(targets), progress=False)
    if side == "masked":
        dsee_scale.prune(model, dsee_scale.PruneConfig(score="W", modules=targets), progress=False)
    return model


def step_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Training steps without an engine: the frozen model, PEFT's LoRA, ours, ours under the mask."""
    base = build(options)
    length = 16 if options.tiny else 2048
    for name, targets in reversed(TARGETS.items()):
        models = {side: side_of(side, base, targets) for side in ("frozen", "peft", "ours", "masked")}
        for sequences in (1,) if options.tiny else (1, 4):
            tokens = batch_of(base.config, sequences, length)
            few = {"repeats": 1, "warm_up": 1} if options.tiny else {}
            took = {side: seconds(stepper(model, tokens), **few) for side, model in models.items()}
            case = f"{name}, {tokens.numel()} tokens"
            report_step(report, case, took, base.config, targets, RANK, sequences, length)
        del models


def stepper(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=ON_GPU) if trained else None

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


# Masks, supports, re-fit


def masks_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Prunings of a whole model, each of new random weights."""
    import dsee_scale
    from dsee_scale import PruneConfig
    from dsee_scale.passes.pools import block_linears

    few = {"sparsity": 0.5, "scope": "matrix"}
    kinds: dict[str, dict[str, Any]] = {
        "W": {"score": "W"},
        "WABS": {"score": "WABS"},
        "wanda": {"score": "wanda", "refit": False},
        "2:4": {"score": "W", "pattern": "2:4"},
        "neurons": {"score": "W", "pattern": "neurons", **few},
        "heads": {"score": "W", "pattern": "heads", **few},
    }
    for name, settings in kinds.items():
        if name in ("W", "neurons"):  # a model that has neither groups nor units yet
            model = build(options)
            dsee_scale.inject(model, adapter_config(TARGETS["q and v"]), progress=False)
            weights = [layer.weight for layer in block_linears(model).values()]
            entries = sum(weight.numel() for weight in weights)
            batches = [batch_of(model.config, 1, 16 if options.tiny else 2048) for _ in range(2)]
        took = []
        for _ in range(2):
            for weight in weights:
                weight.data.normal_(std=0.02)
            seen = dsee_scale.calibrate(model, batches, progress=False) if name == "wanda" else None
            wait()
            started = time.perf_counter()
            dsee_scale.prune(model, PruneConfig(**settings), seen, progress=False)
            wait()
            took.append(time.perf_counter() - started)
        # Each entry read once and written once, at least.
        case, bound = f"prune, {name}", floor(bytes_moved=4 * entries)
        report.timed(case, "time", min(took), bound, entries=entries, goal=GOALS["prune"])
        if name == "W":
            report.timed(case, "time, by bandwidth", min(took), bound, goal=GOALS["mask bandwidth"])


def supports_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Supports of all linear layers from their decomposition."""
    import dsee_scale
    from dsee_scale.passes.pools import block_linears

    model = build(options)
    entries = sum(layer.weight.numel() for layer in block_linears(model).values())
    wait()
    started = time.perf_counter()
    dsee_scale.inject(model, adapter_config(ALL, support="grebsmo"), progress=False)
    wait()
    took, bound = time.perf_counter() - started, floor(bytes_moved=2 * entries)
    report.timed("supports", "time", took, bound, goal=GOALS["supports"])


def refit_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Statistics, and the re-fit block by block, beside the forward passes' own time."""
    import dsee_scale

    model = build(options)
    count, sequences, length = (2, 2, 16) if options.tiny else (32, 4, 2048)
    batches = [{"input_ids": batch_of(model.config, sequences, length)} for _ in range(count)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False, logits_to_keep=1)

    bound = count * floor(flops=frozen_flops(model.config, sequences, length, forward_only=True))
    dsee_scale.inject(model, adapter_config(TARGETS["q and v"]), progress=False)
    size = f"{count * sequences} x {length} tokens, {model.config.num_hidden_layers} blocks"
    passes = seconds(forward, repeats=1, warm_up=1)
    report.timed(size, "forward passes", passes, bound)
    calibrated = seconds(lambda: dsee_scale.calibrate(model, batches, progress=False), repeats=1, warm_up=0)
    report.timed(size, "calibrate", calibrated, bound, passes)
    refit = seconds(
        lambda: dsee_scale.prune(model, dsee_scale.PruneConfig(sparsity=0.5), batches, progress=False),
        repeats=1,
        warm_up=0,
    )
    report.timed(size, "prune with re-fit", refit, 2 * bound, passes)


# Single products


def residual_case(report: GpuReport, options: argparse.Namespace) -> None:
    """The sparse residual, forward and backward, against a dense masked layer and torch.sparse."""
    from sparse_residual import Case, check

    shapes = [(32, 16)] if options.tiny else [(4096, 4096), (14336, 4096)]
    tokens = 16 if options.tiny else 2048
    for outputs, inputs in shapes:
        for count in (
            (8,) if options.tiny else (64, *(round(outputs * inputs * s) for s in (1e-4, 1e-3, 1e-2)))
        ):
            case = Case((outputs, inputs), tokens, count, torch.bfloat16, DEVICE)
            case.make_dense()
            check(case)
            rows, columns = case.rows.unique().numel(), case.cols.unique().numel()
            ours, dense = seconds(case.ours, repeats=9), seconds(case.dense_masked)
            bound = floor(bytes_moved=residual_bytes(tokens, rows, columns, 2))
            name = f"{outputs} x {inputs}, N = {count}, {tokens} tokens"
            few = count <= 2e-3 * outputs * inputs or options.tiny
            goals = {"goal": GOALS["residual"]} if few else {}
            report.timed(
                name, "against dense masked", ours, bound, dense, method=case.support.method, **goals
            )
            try:
                sparse = seconds(case.torch_sparse)
            except RuntimeError:  # torch.sparse does not know bfloat16 everywhere
                continue
            report.timed(name, "against torch.sparse", ours, bound, sparse)


def semi_case(report: GpuReport, options: argparse.Namespace) -> None:
    """A 2:4 weight in PyTorch's semi-structured form against cuBLAS with the same weight dense."""
    from torch.sparse import to_sparse_semi_structured

    for size in (64,) if options.tiny else (4096, 8192):
        weight = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
        weight.view(-1, 4)[:, :2] = 0
        packed = to_sparse_semi_structured(weight) if ON_GPU else weight
        for tokens in (16,) if options.tiny else (512, 1024, 2048, 4096, 8192):
            x = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16)
            took = [
                seconds(lambda w=w, x=x: nn.functional.linear(x, w), repeats=15) for w in (packed, weight)
            ]
            moved = 2 * (size * size * 9 / 16 + 2 * tokens * size)
            bound = floor(bytes_moved=moved, flops=tokens * size * size)
            report.timed(f"{size} x {size}, {tokens} tokens", "2:4 product", took[0], bound, took[1])


# Memory


def memory_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Peaks of inject, step, prune and export under ZeRO-3 in one process, beside the plan."""
    import deepspeed
    from memory import ds_config
    from transformers import AutoModelForCausalLM

    import dsee_scale
    from dsee_scale.planning.plan import Setting, make_plan
    from dsee_scale.planning.shapes import shape_of_config

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
    deepspeed.init_distributed("nccl" if ON_GPU else "gloo")
    length = 16 if options.tiny else 2048
    config, settings = config_of(options), ds_config("bf16", argparse.Namespace(batch=1))
    targets = TARGETS["q and v"]
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, made = batch_of(config, 1, length), {}

    def train() -> None:
        parameters = dsee_scale.trainable_parameters(model)
        made["engine"] = deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]
        for _ in range(2):
            loss = made["engine"](input_ids=tokens, labels=tokens).loss
            made["engine"].backward(loss)
            made["engine"].step()

    phases = {
        "decompose": lambda: dsee_scale.inject(model, adapter_config(targets, support="grebsmo")),
        "train": train,
        "prune": lambda: dsee_scale.prune(made["engine"], dsee_scale.PruneConfig(score="W")),
        "export": lambda: dsee_scale.export_model(made["engine"], folder, overwrite=True),
    }
    setting = Setting(gpus=1, rank=RANK, num_sparse=NUM_SPARSE, targets=targets, batch=1, length=length)
    plan = make_plan(shape_of_config(config), setting)
    with tempfile.TemporaryDirectory() as folder:
        for phase, run in phases.items():
            peak = peak_memory(lambda: None, lambda _, run=run: run())
            planned = plan.phases[phase].gpu
            over, goal = peak / planned, GOALS["memory"]
            report.add(
                f"ZeRO-3, {phase}", "peak memory", "B", peak, planned, measured_over_plan=over, goal=goal
            )


CASES = {
    "step": step_case,
    "masks": masks_case,
    "residual": residual_case,
    "semi": semi_case,
    "supports": supports_case,
    "memory": memory_case,
    "refit": refit_case,
}

if __name__ == "__main__":
    main()
