"""Which base model a file belongs to: its id, and the settings in its config that last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dsee_scale.errors import FormatError
from dsee_scale.partition.quantized import find_codecs

_VOLATILE = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "id2label",
    "label2id",
    "num_labels",
    "quantization_config",
    "gradient_checkpointing",
    "attn_implementation",
    "chunk_size_feed_forward",
}
_VOLATILE_ENDS = ("_token_id", "_pdrop", "dropout", "_dropout_prob", "layerdrop")
_VOLATILE_STARTS = ("_", "output_")


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Id, class, dtype, and the lasting part of the config with its SHA-256 (None for a model without one).

    `full_config` is the config as transformers would write it unquantised, for an export that has no model at
    hand; `quantization` is how the base was quantised, None for not at all.
    """
    config = getattr(model, "config", None)
    values = lasting_config(config) if hasattr(config, "to_dict") else None
    codecs = find_codecs(model)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in codecs)
    full = json.loads(config.to_json_string()) if values is not None else {}  # type: ignore[union-attr]
    quantization = full.pop("quantization_config", None)
    return {
        "id": getattr(config, "_name_or_path", None) or None,
        "class": type(model).__name__,
        "dtype": str(next(floating, torch.float32)).removeprefix("torch."),
        "config_sha256": config_hash(values) if values is not None else None,
        "config": values,
        "full_config": full or None,
        "quantization": quantization,
    }


def lasting_config(config: Any) -> dict[str, Any]:
    """A transformers config as plain values, without what changes from load to load."""
    return _without_volatile(json.loads(json.dumps(config.to_dict(), default=str)))


def config_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of a config's canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_base(saved: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Compare the base that a file was made for with the one at hand.

    Keys that only one side has are passed over: transformers adds some with every version.

    Raises:
        FormatError: the configs differ; the message lists where.
    """
    ours, theirs = saved.get("config") or {}, found.get("config") or {}
    if saved.get("config_sha256") == found.get("config_sha256"):
        return
    differing = [
        f"{key} {ours[key]!r} there, {theirs[key]!r} here"
        for key in sorted({*ours} & {*theirs})
        if ours[key] != theirs[key]
    ]
    if differing:
        raise FormatError(
            f"{where} was made for another base model ({_label(saved)}; this one is {_label(found)}): "
            f"{'; '.join(differing[:6])}. Load the base that it was made for"
        )


def _label(identity: Mapping[str, Any]) -> str:
    return str(identity.get("id") or identity.get("class"))


def _without_volatile(values: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if key in _VOLATILE or key.endswith(_VOLATILE_ENDS) or key.startswith(_VOLATILE_STARTS):
            continue
        kept[key] = _without_volatile(value) if isinstance(value, dict) else value
    return kept
