"""The cases of benchmarks/gpu.py, each run as `_gpu_cases.py --case NAME`; on a GPU, or with --tiny anywhere."""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo  # before any zero.Init context
from _floors import floor, frozen_flops, linear_entries, prune_bytes, residual_bytes
from _gpu_report import DEVICE, GOALS, ON_GPU, Goal, GpuReport, report_step, seconds
from _ranks import free_port, peak_memory
from masks import magnitude, mask_in_place
from torch import Tensor, nn

RANK, NUM_SPARSE = 16, 64
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"q and v": ("q_proj", "v_proj"), "all linear": ALL}
SHAPES = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "tiny": (64, 128, 2, 4, 2, 128),
}


def main() -> int:
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
    shape = {"model": chosen.model, "blocks": chosen.layers or SHAPES[chosen.model][2]}
    failed = False
    for case in chosen.case:
        single = case in ("residual", "semi")  # products, of shapes that are no model's
        report = GpuReport("gpu", device=device, **({} if single else shape))
        report.attempt(case, CASES[case], report, chosen)
        failed |= report.failed
    return int(failed)


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


def batch_of(config: Any, sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (sequences, length), generator=generator).to(DEVICE)


def adapter_config(targets: tuple[str, ...], **settings: Any) -> Any:
    import dsee_scale

    own = dict(rank=RANK, alpha=2 * RANK, num_sparse=NUM_SPARSE, target_modules=targets, support="random")
    return dsee_scale.DSEEConfig(**{**own, **settings})


# Training step


def side_of(side: str, base: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    """One way to train a model; the frozen weights are shared, but for those that are pruned.

    On every side gradients go down to the embeddings, so that sides differ by their adapters alone.
    """
    import dsee_scale

    shared = {} if side == "masked" else {id(p): p for p in base.parameters()}
    model = copy.deepcopy(base, shared).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
    if side == "frozen":
        return model
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets), lora_dropout=0.0)
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    dsee_scale.inject(model, adapter_config(targets), progress=False)
    if side == "masked":
        dsee_scale.prune(model, dsee_scale.PruneConfig(score="W", modules=targets), progress=False)
    return model


def step_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Training steps without an engine: the frozen model, PEFT's LoRA, ours, ours under the mask."""
    base = build(options)
    for name, targets in reversed(TARGETS.items()):
        report.attempt(name, time_targets, report, options, base, name, targets)


def time_targets(
    report: GpuReport, options: argparse.Namespace, base: nn.Module, name: str, targets: tuple[str, ...]
) -> None:
    """Steps of all sides in turn, with few tokens and with many; a side whose first step fails is left out."""
    length = 16 if options.tiny else 2048
    models: dict[str, nn.Module] = {}

    def add(side: str) -> None:
        model = side_of(side, base, targets)
        stepper(model, batch_of(base.config, 1, length))()
        models[side] = model

    def time_steps(case: str, tokens: Tensor) -> None:
        steps = [stepper(model, tokens) for model in models.values()]
        medians = seconds(*steps, repeats=1 if options.tiny else 4, warm_up=1)
        took = dict(zip(models, medians, strict=True))
        report_step(report, case, took, base.config, targets, RANK, len(tokens), length)

    for side in ("frozen", "peft", "ours", "masked"):
        report.attempt(f"{name}, {side}", add, side)
    for sequences in (1,) if options.tiny else (1, 4):
        case = f"{name}, {sequences * length} tokens"
        report.attempt(case, time_steps, case, batch_of(base.config, sequences, length))


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
    """The exact mask of a whole model alone, and prunings of it."""
    import dsee_scale

    model = build(options)
    dsee_scale.inject(model, adapter_config(TARGETS["q and v"]), progress=False)
    batches = [batch_of(model.config, 1, 16 if options.tiny else 2048) for _ in range(2)]
    kinds: dict[str, dict[str, Any]] = {
        "W": {},
        "WABS": {"score": "WABS"},
        "wanda": {"score": "wanda", "refit": False},
        "2:4": {"pattern": "2:4"},
        **{k: {"pattern": k, "sparsity": 0.5, "scope": "matrix"} for k in ("heads", "neurons")},
    }
    report.attempt("mask, W", time_mask, report, model)
    for name, settings in kinds.items():
        report.attempt(f"prune, {name}", time_prune, report, model, batches, name, {"score": "W", **settings})


def time_mask(report: GpuReport, model: nn.Module) -> None:
    """The exact mask alone, chosen and applied: the fastest of three times, of new random weights each."""
    weights, took = block_weights(model), []
    for _ in range(3):
        renew_(weights)
        took += seconds(partial(mask_in_place, weights, magnitude(weights), None), repeats=1, warm_up=0)
    bound = floor(bytes_moved=prune_bytes(model.config, "W"))
    report.timed("mask, W", "time", min(took), bound, goal=GOALS["mask bandwidth"])


def block_weights(model: nn.Module) -> list[Tensor]:
    return [param.data for name, param in model.named_parameters() if name.endswith("proj.weight")]


def renew_(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.normal_(std=0.02)


def time_prune(
    report: GpuReport, base: nn.Module, batches: list[Tensor], name: str, settings: dict[str, Any]
) -> None:
    """The faster one of two prunings of a copy, each of new random weights."""
    import dsee_scale

    model, took = copy.deepcopy(base), []
    weights = block_weights(model)
    for _ in range(2):
        renew_(weights)
        seen = dsee_scale.calibrate(model, batches, progress=False) if name == "wanda" else None
        run = partial(dsee_scale.prune, model, dsee_scale.PruneConfig(**settings), seen, progress=False)
        took += seconds(run, repeats=1, warm_up=0)
    case, entries = f"prune, {name}", linear_entries(model.config, name)
    bound = floor(bytes_moved=prune_bytes(model.config, name))
    report.timed(case, "time", min(took), bound, entries=entries, goal=GOALS["prune"])


def supports_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Supports of all linear layers from their decomposition."""
    import dsee_scale

    model = build(options)
    bound = floor(bytes_moved=2 * linear_entries(model.config))
    run = partial(dsee_scale.inject, model, adapter_config(ALL, support="grebsmo"), progress=False)
    (took,) = seconds(run, repeats=1, warm_up=0)
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

    def time_once(metric: str, run: Callable[..., Any], bound: float, *words: Any) -> None:
        took = seconds(partial(run, model, *words, batches, progress=False), repeats=1, warm_up=0)
        report.timed(size, metric, *took, bound, passes)

    bound = count * floor(flops=frozen_flops(model.config, sequences, length, forward_only=True))
    dsee_scale.inject(model, adapter_config(TARGETS["q and v"]), progress=False)
    size, pruning = f"{count * sequences} x {length} tokens", dsee_scale.PruneConfig(sparsity=0.5)
    (passes,) = seconds(forward, repeats=1, warm_up=1)
    report.timed(size, "forward passes", passes, bound)
    report.attempt(f"{size}, calibrate", time_once, "calibrate", dsee_scale.calibrate, bound)
    report.attempt(f"{size}, re-fit", time_once, "prune with re-fit", dsee_scale.prune, 2 * bound, pruning)


# Single products


def residual_case(report: GpuReport, options: argparse.Namespace) -> None:
    """The sparse residual, forward and backward, against a dense masked layer and torch.sparse."""
    tokens = 16 if options.tiny else 2048
    for shape in [(32, 16)] if options.tiny else [(4096, 4096), (14336, 4096)]:
        entries = shape[0] * shape[1]
        for count in (8,) if options.tiny else (64, *(round(entries * s) for s in (1e-4, 1e-3, 1e-2))):
            name = f"{shape[0]} x {shape[1]}, N = {count}, {tokens} tokens"
            goal = GOALS["residual"] if options.tiny or count <= 2e-3 * entries else None
            report.attempt(name, time_residual, report, name, shape, tokens, count, goal)


def time_residual(
    report: GpuReport, name: str, shape: tuple[int, int], tokens: int, count: int, goal: Goal | None
) -> None:
    from sparse_residual import Case, check

    case = Case(shape, tokens, count, torch.bfloat16, DEVICE)
    case.make_dense()
    check(case)
    rows, columns = case.rows.unique().numel(), case.cols.unique().numel()
    bound = floor(bytes_moved=residual_bytes(tokens, rows, columns, 2))
    ours, dense = seconds(case.ours, case.dense_masked, repeats=9)
    report.timed(name, "against dense masked", ours, bound, dense, method=case.support.method, goal=goal)
    try:
        ours, sparse = seconds(case.ours, case.torch_sparse)
    except RuntimeError as error:  # torch.sparse does not know bfloat16 everywhere
        report.say(f"{name}, torch.sparse", f"left out: {str(error).splitlines()[0]}")
    else:
        report.timed(name, "against torch.sparse", ours, bound, sparse)


def semi_case(report: GpuReport, options: argparse.Namespace) -> None:
    """A 2:4 weight in PyTorch's semi-structured form against cuBLAS with the same weight dense."""
    for size in (64,) if options.tiny else (4096, 8192):
        for tokens in (16,) if options.tiny else (512, 1024, 2048, 4096, 8192):
            name = f"{size} x {size}, {tokens} tokens"
            report.attempt(name, time_semi, report, name, size, tokens)


def time_semi(report: GpuReport, name: str, size: int, tokens: int) -> None:
    from torch.sparse import to_sparse_semi_structured

    weight = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    weight.view(-1, 4)[:, :2] = 0
    packed = to_sparse_semi_structured(weight) if ON_GPU else weight
    x = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16)
    sparse, dense = seconds(*(partial(nn.functional.linear, x, w) for w in (packed, weight)), repeats=15)
    moved = 2 * (size * size * 9 / 16 + 2 * tokens * size)
    report.timed(name, "2:4 product", sparse, floor(bytes_moved=moved, flops=tokens * size * size), dense)


def memory_case(report: GpuReport, options: argparse.Namespace) -> None:
    """Peaks of inject, step, prune and export under ZeRO-3 in one process, beside the plan."""
    import deepspeed
    from memory import ds_config
    from transformers import AutoModelForCausalLM

    import dsee_scale
    from dsee_scale.planning.plan import Setting, make_plan
    from dsee_scale.planning.shapes import shape_of_config

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **meeting)
    deepspeed.init_distributed("nccl" if ON_GPU else "gloo")
    config, targets = config_of(options), TARGETS["q and v"]
    tokens = batch_of(config, 1, 16 if options.tiny else 2048)
    settings = ds_config("bf16", argparse.Namespace(batch=1))
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    made = {"engine": model}  # what later phases take where training fails

    def train() -> None:
        parameters = dsee_scale.trainable_parameters(model)
        engine = deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]
        for _ in range(2):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        made["engine"] = engine

    phases = {
        "decompose": lambda: dsee_scale.inject(model, adapter_config(targets, support="grebsmo")),
        "train": train,
        "prune": lambda: dsee_scale.prune(made["engine"], dsee_scale.PruneConfig(score="W")),
        "export": lambda: dsee_scale.export_model(made["engine"], folder, overwrite=True),
    }
    size = dict(batch=1, length=tokens.numel(), rank=RANK, num_sparse=NUM_SPARSE)
    plan = make_plan(shape_of_config(config), Setting(gpus=1, targets=targets, **size))

    def measure(phase: str) -> None:
        peak, planned = peak_memory(lambda: None, lambda _: phases[phase]()), plan.phases[phase].gpu
        over = {"measured_over_plan": peak / planned, "goal": GOALS["memory"]}
        report.add(f"ZeRO-3, {phase}", "peak memory", "B", peak, planned, **over)

    with tempfile.TemporaryDirectory() as folder:
        for phase in phases:
            report.attempt(f"ZeRO-3, {phase}", measure, phase)


CASES = {
    case.__name__.removesuffix("_case"): case
    for case in (step_case, masks_case, supports_case, refit_case, residual_case, semi_case, memory_case)
}

if __name__ == "__main__":
    raise SystemExit(main())
