"""Command lines written for the paper's repository (transformers 4.11), as transformers 5 reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # below 1 it is a fraction of the steps
    "use_auth_token": "use_token",
}
REPLACED = {
    "adafactor": ("--optim", "adafactor"),
    "group_by_length": ("--train_sampling_strategy", "group_by_length"),
}
WITHOUT_EFFECT = {
    "logging_dir": "set TENSORBOARD_LOGGING_DIR instead",
    "use_fast_tokenizer": "transformers 5 has fast tokenizers alone",
    "fp16_opt_level": "apex is not used",
    "fp16_backend": "PyTorch's own is used",
    "half_precision_backend": "PyTorch's own is used",
    "save_safetensors": "files are safetensors",
    "overwrite_cache": "tokenized rows are not kept between runs",
    "past_index": "encoders keep no past",
    "tpu_num_cores": "there is no TPU support",
    "local_rank": "the launcher's environment says it",
}
REFUSED = {
    **dict.fromkeys(
        (
            "slimming",
            "l1_loss_coef",
            "l1_loss_self_coef",
            "l1_loss_inter_coef",
            "self_pruning_ratio",
            "self_pruning_method",
            "inter_pruning_ratio",
            "inter_pruning_method",
            "self_slimming_coef_file",
            "inter_slimming_coef_file",
            "slimming_coef_step",
        ),
        "network slimming is no part of DSEE; use --prune_heads_num for heads",
    ),
    **dict.fromkeys(
        ("prune_before_train", "prune_before_eval", "load_from_pruned", "lottery_ticket_training"),
        "weights are pruned before training whenever a ratio or a number of heads is given",
    ),
    "sharded_ddp": "fairscale is gone; use --deepspeed ds_configs/zero3_bf16.json",
    "fsdp": "weights are partitioned by DeepSpeed ZeRO here; use --deepspeed",
    "push_to_hub": "upload the exported folder instead",
    "auto_find_batch_size": "it starts the training loop again on a model that is already pruned",
    "save_only_model": "a checkpoint without optimizer state cannot be resumed",
}


def modern_words(argv: Sequence[str]) -> list[str]:
    """Command-line words with old names replaced and flags without effect left out.

    Args:
        argv: flags and values, or a single name of a JSON file that holds them.

    Raises:
        ConfigError: a flag whose meaning does not exist here, with what to use instead.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _words_of_file(Path(argv[0]))
    result: list[str] = []
    for name, values in _flags(argv):
        if name in REFUSED and values != ["False"] and values != ["false"]:
            raise ConfigError(f"--{name}: {REFUSED[name]}")
        if name in WITHOUT_EFFECT:
            if name != "local_rank":
                logger.warning("--%s has no effect: %s", name, WITHOUT_EFFECT[name])
        elif name in REPLACED:
            result += REPLACED[name] if values in ([], ["True"], ["true"]) else ()
        elif name not in REFUSED:
            result += ["--" + RENAMED.get(name, name)] if name else []
            result += values
    return result


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values) of each flag; words before the first flag come under the name ''."""
    name, values = "", []
    for word in argv:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name or values:
            yield name, values
        name, equals, value = word[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
    if name or values:
        yield name, values


def _words_of_file(path: Path) -> list[str]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, expected an object of flags")
    return [
        word
        for name, value in found.items()
        if value is not None
        for word in (f"--{name}", *map(_word, value if isinstance(value, list) else [value]))
    ]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
