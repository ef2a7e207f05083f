"""A DeepSpeed config that says something else than the recipe is an error, never a silent winner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainingArguments

from dsee_scale.errors import ConfigError
from dsee_scale.training.memory_check import reject_offload


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
    reject_offload(config, str(getattr(args.optim, "value", args.optim)), source)
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
