"""What a recipe asks for together and can't have; a DeepSpeed config never wins over it in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.sections import EXTRA, DataConfig, ExportConfig
from dsee_scale.settings import nearest


def check_form(dsee: DSEEConfig, prunings: Sequence[PruneConfig], export: ExportConfig | None) -> None:
    """Refuse before training what the export would refuse after it."""
    if export is None:
        return
    peft = export.adapter_format == "peft"
    under_mask = any(config.mask_update and not config.removes_units for config in prunings)
    if under_mask and (peft or export.delta == "dense"):
        form = "adapter_format 'peft'" if peft else "delta 'dense'"
        raise ConfigError(
            f"recipe: export.{form} writes W * M + D, and pruned "
            "matrices are trained as (W + D) * M; set export.delta to 'masked', or prune.mask_update to false"
        )
    if peft and any(config.pattern == "experts" for config in prunings):
        raise ConfigError(
            "recipe: the base of adapter_format 'peft' has all experts, removed ones too, which stock routers would "
            "still choose; set export.delta to 'masked', which writes the smaller model"
        )
    if peft and dsee.trained_modules:
        raise ConfigError(
            "recipe: export.adapter_format 'peft' writes a LoRA alone, without dsee.trained_modules; leave them out, "
            "or set export.delta to 'masked'"
        )


LOWER_IS_BETTER = ("loss", "perplexity")


def check_best_metric(metric: str | None, data: DataConfig) -> None:
    """Refuse before training a `metric_for_best_model` that no evaluation of the task gives."""
    known = [*LOWER_IS_BETTER]
    known += ["accuracy", "macro_f1"] if data.task == "classification" else []
    known += ["bleu"] if data.generate_samples else []
    if metric is None or metric.removeprefix("eval_") in known:
        return
    more = "; bleu needs data.generate_samples" if data.task == "completion" and "bleu" not in known else ""
    raise ConfigError(
        f"training.metric_for_best_model {metric!r} is no metric of task {data.task!r}; "
        f"valid: {', '.join(known)}{more}"
    )


def set_direction(values: dict[str, Any]) -> None:
    """Which way the best metric is better: transformers takes all but a loss for better when greater, perplexity too.

    Raises:
        ConfigError: `greater_is_better` says otherwise.
    """
    metric, said = values.get("metric_for_best_model"), values.get("greater_is_better")
    if not isinstance(metric, str):
        return
    greater = metric.removeprefix("eval_") not in LOWER_IS_BETTER
    if said is not None and bool(said) != greater:
        raise ConfigError(
            f"training.greater_is_better is {said!r}, and the best {metric} is the "
            f"{'greatest' if greater else 'least'}; leave it out"
        )
    values["greater_is_better"] = greater


def check_deepspeed_config(config: Mapping[str, Any], args: TrainingArguments, source: str) -> None:
    """Compare a DeepSpeed config with the recipe's TrainingArguments; `"auto"` agrees with everything.

    Args:
        config: the parsed JSON.
        args: the recipe's arguments.
        source: where the config came from, for the message.

    Raises:
        ConfigError: naming every key on both sides.
    """
    problems = [
        f"{key} is {found!r}, but training.{name} is {expected!r}"
        for key, name, expected in _expected_values(args)
        if (found := _look_up(config, key)) not in (None, "auto") and not _same(found, expected)
    ]
    if "scheduler" in config:
        problems.append(
            "section scheduler knows no phases; remove it and set training.lr_scheduler_type and "
            "training.warmup_steps, which start afresh in retune"
        )
    for mode in ("bf16", "fp16"):
        if getattr(args, mode) and _look_up(config, f"{mode}.enabled") is None:
            problems.append(f"{mode}.enabled is absent, but training.{mode} is True")
    reject_unsupported(config, str(getattr(args.optim, "value", args.optim)), source)
    if problems:
        hint = 'write "auto" there to take the recipe\'s value'
        raise ConfigError(f"{source} contradicts the recipe: {'; '.join(problems)} ({hint})")


def _expected_values(args: TrainingArguments) -> Iterator[tuple[str, str, Any]]:
    """(key in the DeepSpeed config, name of the argument, its value)."""
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    product = "per_device_train_batch_size * gradient_accumulation_steps * world size"
    yield "train_micro_batch_size_per_gpu", "per_device_train_batch_size", micro
    yield "gradient_accumulation_steps", "gradient_accumulation_steps", accumulation
    yield "train_batch_size", product, micro * accumulation * args.world_size
    yield "gradient_clipping", "max_grad_norm", args.max_grad_norm
    yield "bf16.enabled", "bf16", args.bf16
    yield "fp16.enabled", "fp16", args.fp16
    yield "optimizer.params.lr", "learning_rate", args.learning_rate
    yield "optimizer.params.betas", "adam_beta1, adam_beta2", [args.adam_beta1, args.adam_beta2]
    yield "optimizer.params.eps", "adam_epsilon", args.adam_epsilon
    yield "optimizer.params.weight_decay", "weight_decay", args.weight_decay


def _look_up(config: Mapping[str, Any], dotted: str) -> Any:
    node: Any = config
    for key in dotted.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _same(found: Any, expected: Any) -> bool:
    try:
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        return all(float(a) == float(b) for a, b in pairs)
    except (TypeError, ValueError):
        return False


SEEDS = 2**32 - 1
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, 2**31)),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), (1, 2**31)),
    **dict.fromkeys(("seed", "data_seed"), (0, SEEDS)),
    **dict.fromkeys(("dataloader_num_workers",), (0, 1024)),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (1e-9, 2**31)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0, 1 - 1e-12)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs"), (0, 2**31)),
    "adam_epsilon": (1e-300, 1),
    "learning_rate": (1e-300, 1e300),
    "ddp_timeout": (1, 10**8),
    "max_steps": (-1, 2**31),
}
"""Smallest and largest value of TrainingArguments that transformers does not look at, or only once it is too late."""


def argument_problems(section: Mapping[str, Any]) -> list[str]:
    """A sentence for each of the Trainer's arguments that is out of range."""
    return [
        f"{name} must lie in [{low:g}, {high:g}], found {value!r}"
        for name, (low, high) in RANGES.items()
        if isinstance(value := section.get(name), (int, float))
        and not isinstance(value, bool)
        and not low <= value <= high
    ]


MARKS = ("8bit", "paged", "bnb", "lion", "ademamix")
"""Parts of the names of the Trainer's optimizers that bitsandbytes brings, ..."""
OTHERS = ("torch", "galore")
"""... and of optimizers that are called like them but come from elsewhere."""


def from_bitsandbytes(optim: str) -> bool:
    """Whether one of the Trainer's optimizers comes from bitsandbytes."""
    return any(mark in optim for mark in MARKS) and not any(other in optim for other in OTHERS)


def optimizer_problem(optim: Any) -> str | None:
    """A sentence if there is no such `training.optim`, it lacks bitsandbytes, or no checkpoint holds its moments."""
    known = [str(member.value) for member in OptimizerNames]
    if isinstance(optim, str) and optim not in known:
        return f"optim {optim!r} is unknown; {nearest(optim, known) or 'valid: ' + ', '.join(known)}"
    if isinstance(optim, str) and from_bitsandbytes(optim) and find_spec("bitsandbytes") is None:
        return f"optim {optim!r} needs bitsandbytes, which is not installed: {EXTRA}"
    if isinstance(optim, str) and "ademamix" in optim:
        return f"optim {optim!r} keeps two moments in one tensor, which no checkpoint here holds; use adamw_bnb_8bit"
    return None


def reject_unsupported(config: Mapping[str, Any], optim: str, source: str) -> None:
    """Refuse what a run does not go with: NVMe, DeepCompile, Ulysses, an optimizer that would silently be replaced.

    Args:
        config: DeepSpeed's JSON as a mapping.
        optim: name of the Trainer's optimizer.
        source: where the config came from, for the message.

    Raises:
        ConfigError: naming the setting and the way out.
    """
    zero = config.get("zero_optimization") or {}
    param, optimizer = (_device(zero, f"offload_{part}") for part in ("param", "optimizer"))
    problems = []
    if param == "nvme":
        problems.append(
            "offload_param to NVMe is not supported, since masks are written into the stored shards and those "
            'lie in files then; set "offload_param": {"device": "cpu"}'
        )
    if optimizer == "nvme":
        problems.append(
            "offload_optimizer to NVMe saves nothing here: the states are those of the adapters, megabytes, and "
            'could not be saved from there; set "offload_optimizer": {"device": "cpu"} or leave it out'
        )
    if (config.get("compile") or {}).get("deepcompile"):
        problems.append(
            "compile.deepcompile inserts its own gathers into the graph, on CUDA only (DeepSpeed 0.19.8), and was "
            "never run with adapters; leave it out: torch.compile works without it"
        )
    if (config.get("expert_parallel") or {}).get("enabled"):
        problems.append(
            "expert_parallel (AutoEP) replaces the adapted layers by its own, of which each rank holds different "
            "experts; leave it out: ZeRO-3 partitions the model's own experts"
        )
    if (config.get("sequence_parallel_size") or 1) > 1:
        problems.append(
            "sequence_parallel_size: a run evaluates and calibrates on whole sequences; leave it out, or split "
            "sequences in a loop of your own"
        )
    if from_bitsandbytes(optim):
        if "optimizer" in config:
            problems.append(
                f"section optimizer takes the place of training.optim {optim!r}; remove that section"
            )
        elif optimizer != "none":
            problems.append(
                f"training.optim {optim!r} does not go with offload_optimizer, which runs DeepSpeed's own "
                "CPU Adam; leave offload_optimizer out, or set training.optim to adamw_torch"
            )
    if problems:
        raise ConfigError(f"{source}: {'; '.join(problems)}")


def _device(zero: Mapping[str, Any], key: str) -> str:
    section = zero.get(key) or {}
    return str(section.get("device", "none")).lower()
