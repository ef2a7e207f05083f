"""Which base model a file was made for, and whether the one at hand is it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.errors import FormatError
from dsee_scale.partition.quantized import find_codecs
from dsee_scale.partition.ranks import stored_dtype

REFIT = "dsee_refit"
"""In the config of weights that a re-fit or an export with the update put in left: which ones, see `refit_mark`."""


_VOLATILE = {
    REFIT,
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
    hand; `quantization` is how the base was quantised, None for not at all; `refit` is its `refit_mark`; `blocks` is
    `ModelState.blocks`.
    """
    config = getattr(model, "config", None)
    values = lasting_config(config.to_dict()) if hasattr(config, "to_dict") else None  # type: ignore[union-attr]
    codecs = find_codecs(model)
    floating = (stored_dtype(p) for p in model.parameters() if p.is_floating_point() and id(p) not in codecs)
    full = json.loads(config.to_json_string()) if values is not None else {}  # type: ignore[union-attr]
    quantization = full.pop("quantization_config", None)
    full.pop(REFIT, None)
    return {
        "id": getattr(config, "_name_or_path", None) or None,
        "class": type(model).__name__,
        "dtype": str(next(floating, torch.float32)).removeprefix("torch."),
        "config_sha256": config_hash(values) if values is not None else None,
        "config": values,
        "full_config": full or None,
        "quantization": quantization,
        "refit": refit_mark(model),
        "blocks": model_state(model).blocks,
    }


def refit_mark(model: nn.Module) -> str | None:
    """Which re-fit or merged update left a model's frozen weights, 16 hexadecimal digits. Local.

    By its own record or its config; None for weights as they were published.
    """
    return content_mark(model_state(model).pruned) or getattr(getattr(model, "config", None), REFIT, None)


def merged_mark(
    before: str | None, modules: Mapping[str, AdapterSpec], trained: Collection[str]
) -> str | None:
    """What `refit_mark` is of an export with the update put in, so that none is put in twice.

    Args:
        before: `refit_mark` of the model that is exported.
        modules: its adapted modules.
        trained: names of the parameters that it trains in full.
    """
    if not modules and not trained:
        return before
    specs = {name: dataclasses.asdict(spec) for name, spec in modules.items()}
    return config_hash({"merged": [before, specs, sorted(trained)]})[:16]


def content_mark(pruned: Mapping[str, Mapping[str, Any]]) -> str | None:
    """`refit_mark` by the contents of re-fitted weights alone."""
    known = {name: how["content"] for name, how in pruned.items() if "content" in how}
    return config_hash(known)[:16] if known else None


def lasting_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers config's values, plain, without what changes from load to load."""
    return _without_volatile(json.loads(json.dumps(values, default=str)))


def config_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of a config's canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def other_base(where: str, name: str) -> str:
    """What to say of a base whose re-fitted weight is not the one that files were made with."""
    return (
        f"{where} belongs to a base whose weights were re-fitted, and {name} is another one here: load the `base` "
        "folder of that run (or what export_model(model, folder, delta='none') wrote after the pruning)"
    )


def other_weights(where: str, saved: Mapping[str, Any], name: str) -> str:
    """What to say of a base that has the right shapes and other frozen weights."""
    return (
        f"{where} was made on other weights than this base has, of which {name} is one. An update is worth little on a "
        f"base that it was not trained on: load {base_label(saved)}, or go on if these weights are meant"
    )


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
            f"{where} was made for another base model ({base_label(saved)}; this one is {base_label(found)}): "
            f"{'; '.join(differing[:6])}. Load the base that it was made for"
        )


def base_label(identity: Mapping[str, Any]) -> str:
    """What to call a base in a message."""
    return str(identity.get("id") or identity.get("class"))


def _without_volatile(values: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if key in _VOLATILE or key.endswith(_VOLATILE_ENDS) or key.startswith(_VOLATILE_STARTS):
            continue
        kept[key] = _without_volatile(value) if isinstance(value, dict) else value
    return kept
