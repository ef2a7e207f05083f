"""Peak memory per rank of a training step: bf16, int8, nf4 and CPU offload, beside PEFT's LoRA of the same rank.

`under the mask` is ours after half of the adapted weights were pruned, with all linear layers adapted.

    python benchmarks/memory.py [--json] [--quick]

A Llama shape under ZeRO-3, frozen but for the adapters. On GPUs the peak is what PyTorch's allocator held; on
CPUs it is resident memory beyond the libraries', so that offloaded shards count there too. `peer` is PEFT.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # must be imported before any zero.Init context
from _ranks import launch, peak_memory, small_llama
from _report import Report, parser
from torch import nn

MASKED = "bf16, under the mask"
EXPERTS, MASKED_EXPERTS = "experts, bf16", "experts, bf16, under the mask"
CASES = ("bf16", MASKED, "int8", "nf4", "bf16, offloaded", EXPERTS, MASKED_EXPERTS)
RANK, NUM_SPARSE = 16, 64
TARGETS = ("q_proj", "v_proj")
ALL = (*TARGETS, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WITH_EXPERTS = (*TARGETS, "experts")


def ds_config(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The repository's own configs, without what they leave to the Trainer."""
    name = "zero3_offload" if "offloaded" in case else "zero3_bf16"
    config = json.loads((Path(__file__).parents[1] / "ds_configs" / f"{name}.json").read_text())
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config.pop(key)
    config["train_micro_batch_size_per_gpu"] = arguments.batch
    config["optimizer"]["params"] = {
        key: 1e-4 if key == "lr" else value
        for key, value in config["optimizer"]["params"].items()
        if key == "lr" or value != "auto"
    }
    if not torch.cuda.is_available():
        for section in config["zero_optimization"].values():
            if isinstance(section, dict):
                section["pin_memory"] = False
    return config


def build_model(case: str, arguments: argparse.Namespace) -> nn.Module:
    """Partitioned while it is made; a quantised one whole, as transformers loads it."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    config = shape_of(case, arguments)
    torch.manual_seed(0)
    if case in ("int8", "nf4"):
        return quantise(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), case)
    with deepspeed.zero.Init(config_dict_or_path=ds_config(case, arguments)):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def shape_of(case: str, arguments: argparse.Namespace) -> Any:
    """The config: a Llama, or a Qwen3-MoE of the same attention with a third of the layers and 16 experts in each."""
    llama = small_llama(arguments.hidden, arguments.layers)
    if "experts" not in case:
        return llama
    # Before any zero.Init: what DeepSpeed (0.19.8) puts back when it ends loses the decorators of classes made inside.
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=llama.vocab_size,
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.hidden // 2,
        num_hidden_layers=max(1, arguments.layers // 3),
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        use_cache=False,
        tie_word_embeddings=True,
    )


def quantise(model: nn.Module, case: str) -> nn.Module:
    """The linear layers of the blocks, in bitsandbytes' format."""
    import bitsandbytes as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or ".layers." not in name:
            continue
        sizes = (layer.in_features, layer.out_features)
        new: Any = (
            bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            if case == "int8"
            else bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        )
        kind = bnb.nn.Int8Params if case == "int8" else bnb.nn.Params4bit
        options = {} if case == "int8" else {"quant_type": "nf4", "module": new}
        new.weight = kind(layer.weight.data, requires_grad=False, **options)
        model.set_submodule(name, new.to(device))
    setattr(model, f"is_loaded_in_{'8' if case == 'int8' else '4'}bit", True)
    return model


def targets_of(case: str) -> tuple[str, ...]:
    if case in (EXPERTS, MASKED_EXPERTS):
        return WITH_EXPERTS
    return ALL if case == MASKED else TARGETS


def adapt(model: nn.Module, side: str, targets: tuple[str, ...]) -> nn.Module:
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "experts" in targets else None
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=[name for name in targets if name != "experts"],
            target_parameters=fused,
            lora_dropout=0.0,
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    import dsee_scale

    settings = dict(rank=RANK, alpha=2 * RANK, num_sparse=NUM_SPARSE, target_modules=targets)
    dsee_scale.inject(model, dsee_scale.DSEEConfig(support="random", **settings), progress=False)
    return model


def build_engine(case: str, side: str, arguments: argparse.Namespace) -> Any:
    import deepspeed

    import dsee_scale

    model = adapt(build_model(case, arguments), side, targets_of(case))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    config = ds_config(case, arguments)
    engine = deepspeed.initialize(model=model.train(), model_parameters=trained, config=config)[0]
    if case in (MASKED, MASKED_EXPERTS) and side == "ours":
        dsee_scale.prune(engine, dsee_scale.PruneConfig(score="W"), progress=False)
    return engine


def run_steps(engine: Any, arguments: argparse.Namespace) -> None:
    """Two training steps."""
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    tokens = torch.randint(0, 4096, (arguments.batch, arguments.length), generator=generator).to(
        engine.device
    )
    for _ in range(2):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()


def worker(arguments: argparse.Namespace) -> None:
    """One rank."""
    import deepspeed

    torch.set_num_threads(arguments.threads)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    # A small engine first: what the libraries load and map at first use does not count.
    small = argparse.Namespace(**{**vars(arguments), "hidden": 128, "layers": 1, "length": 8})
    engine = build_engine(arguments.case, arguments.side, small)
    run_steps(engine, small)
    engine.destroy()
    del engine
    gc.collect()
    found = peak_memory(
        lambda: build_engine(arguments.case, arguments.side, arguments),
        lambda engine: run_steps(engine, arguments),
    )
    Path(f"{arguments.worker}.{os.environ['RANK']}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def planned(case: str, arguments: argparse.Namespace) -> int:
    """What `dsee-scale plan` says for the same step."""
    from dsee_scale.planning.plan import Setting, training_memory
    from dsee_scale.planning.shapes import shape_of_config

    setting = Setting(
        gpus=arguments.processes,
        quantize=case if case in ("int8", "nf4") else None,
        offload="offloaded" in case,
        rank=RANK,
        num_sparse=NUM_SPARSE,
        targets=targets_of(case),
        batch=arguments.batch,
        length=arguments.length,
        checkpointing=arguments.checkpointing,
    )
    shape = shape_of_config(shape_of(case, arguments))
    memory = training_memory(shape, setting, masked=case in (MASKED, MASKED_EXPERTS))
    return memory.gpu if torch.cuda.is_available() else memory.gpu + memory.host


def main() -> None:
    arguments = parser(__doc__)
    on_gpu = torch.cuda.is_available()
    arguments.add_argument("--hidden", type=int, default=576)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--batch", type=int, default=1, help="sequences per rank")
    arguments.add_argument("--length", type=int, default=256, help="tokens per sequence")
    arguments.add_argument("--threads", type=int, default=1, help="per process, on CPU")
    arguments.add_argument("--processes", type=int, default=torch.cuda.device_count() if on_gpu else 2)
    arguments.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    arguments.add_argument("--case", choices=CASES, help="only this")
    arguments.add_argument("--ours-only", action="store_true", help="without PEFT")
    arguments.add_argument("--side", choices=("ours", "peft"), help=argparse.SUPPRESS)
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.worker:
        return worker(arguments)
    if arguments.quick:
        arguments.layers, arguments.length = 6, 128
    report = Report("memory", arguments.json)
    for case in [arguments.case] if arguments.case else CASES:
        peaks = {}
        for side in ("ours",) if arguments.ours_only else ("ours", "peft"):
            words = ["--case", case, "--side", side]
            for name in ("hidden", "layers", "batch", "length", "threads", "processes"):
                words += [f"--{name}", str(getattr(arguments, name))]
            words += ["--checkpointing"] if arguments.checkpointing else []
            peaks[side] = max(
                launch(__file__, words, arguments.processes, arguments.threads, for_memory=True)
            )
        plan = planned(case, arguments)
        share = plan / peaks["ours"]
        report.add(
            case, "peak memory", "B", peaks["ours"], peaks.get("peft"), plan=plan, plan_over_measured=share
        )
    return None


if __name__ == "__main__":
    main()
