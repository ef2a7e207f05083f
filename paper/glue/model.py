"""The model of a run: pretrained or tuned, adapted, pruned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from dsee_scale.adapters.targets import linear_kind
from dsee_scale.checkpoint.adapter import load_adapter
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.files import MANIFEST
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord
from dsee_scale.config import SCORES, DecompositionConfig, DSEEConfig, Pool, PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.passes.inject_model import inject
from dsee_scale.passes.pools import block_linears
from dsee_scale.pruning.prune import prune
from dsee_scale.pruning.prune_report import PruneReport
from paper.glue.arguments import SUPPORTS, GlueSettings, ModelArguments

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
QUERY_AND_VALUE = (("query", "value"), ("query_proj", "value_proj"), ("q_proj", "v_proj"), ("q_lin", "v_lin"))
FUSED = ("in_proj", "c_attn")


@dataclass(frozen=True)
class Source:
    """Where a run starts from.

    Attributes:
        base: hub id or folder of the pretrained model.
        adapter: folder of the adapter to go on from, None for a fresh one.
        record: what that folder says.
    """

    base: str
    adapter: Path | None
    record: AdapterRecord | None

    @property
    def classes(self) -> list[str] | None:
        """Class names that the adapter's model was tuned for, empty for regression; None without an adapter."""
        if self.record is None:
            return None
        names = (self.record.base.get("full_config") or {}).get("id2label") or {}
        ordered = [str(names[key]) for key in sorted(names, key=int)]
        return ordered if len(ordered) > 1 else []


def find_source(settings: GlueSettings, checkpoint: Path | None) -> Source:
    """Read where to start from. Local.

    Raises:
        ConfigError: flags that do not fit the tuned model, or a checkpoint without adapter to evaluate.
        FormatError: a damaged adapter.
    """
    model = settings.model
    folder = checkpoint or _adapter_folder(model)
    if checkpoint is not None and is_plain(settings, checkpoint):
        if not settings.training.get("do_train"):
            raise ConfigError(f"{checkpoint} holds no adapter; evaluate it as --model_name_or_path")
        folder = None
    if folder is None:
        if settings.pruning.prunes and SCORES[settings.pruning.prune_mode].needs_adapter:
            raise ConfigError(
                f"--prune_mode {settings.pruning.prune_mode} reads an update, and {model.model_name_or_path!r} has "
                "none; tune it first and give that run's output folder as --model_name_or_path, or use "
                "--prune_mode W"
            )
        if settings.pruning.prunes and not model.apply_lora:
            raise ConfigError("pruned weights must be frozen, or they would not stay zero: add --apply_lora")
        if model.apply_sparse and not model.apply_lora:
            raise ConfigError("--apply_sparse goes with --apply_lora")
        return Source(model.base_model_name_or_path or model.model_name_or_path, None, None)
    record = AdapterRecord.read(open_folder(folder, KINDS_WITH_ADAPTER))
    _check_same(settings, record, folder)
    named = model.model_name_or_path if model.lora_path or not _holds_adapter(model) else None
    base = model.base_model_name_or_path or named or record.base.get("id")
    if not base:
        raise ConfigError(f"{folder} does not say which model it belongs to: give --base_model_name_or_path")
    return Source(str(base), folder, record)


def is_plain(settings: GlueSettings, checkpoint: Path) -> bool:
    """Whether a checkpoint is the Trainer's own, of a run that trains all weights without an adapter. Local."""
    adapted = settings.model.apply_lora or _adapter_folder(settings.model) is not None
    return not adapted and not (checkpoint / MANIFEST).is_file()


def load_tokenizer(settings: GlueSettings, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer. Local."""
    name = settings.model.tokenizer_name or source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub(settings.model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} does not load: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(
    settings: GlueSettings, source: Source, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Any:
    """The model's config for these classes, in its own order where it knows them. Local."""
    name = settings.model.config_name or source.base
    try:
        config = AutoConfig.from_pretrained(name, **_hub(settings.model))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} does not load: {error}. Give the id of a hub model, a folder with a config.json, or "
            "--base_model_name_or_path if the pretrained model was moved"
        ) from error
    ordered = source.classes or _own_order(config, classes)
    if classes and sorted(ordered) != sorted(classes):
        raise ConfigError(
            f"{source.adapter} was tuned for classes {', '.join(ordered)}; the data hold {', '.join(classes)}"
        )
    config.num_labels = max(1, len(classes))
    if classes:
        config.label2id = {name: index for index, name in enumerate(ordered)}
        config.id2label = dict(enumerate(ordered))
    if settings.model.cls_dropout is not None:
        for key in ("classifier_dropout", "cls_dropout"):
            setattr(config, key, settings.model.cls_dropout)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def load_model(settings: GlueSettings, source: Source, config: Any, dtype: torch.dtype) -> nn.Module:
    """Collective under ZeRO-3. The pretrained model with a classifier, without adapters."""
    return AutoModelForSequenceClassification.from_pretrained(
        source.base, config=config, dtype=dtype, **_hub(settings.model)
    )


def adapt(model: nn.Module, settings: GlueSettings, source: Source, seed: int) -> None:
    """Collective. Put a saved adapter in, or a fresh one."""
    if source.adapter is not None:
        load_adapter(model, source.adapter)
    elif settings.model.apply_lora:
        inject(model, dsee_config(model, settings.model, seed))


def dsee_config(model: nn.Module, flags: ModelArguments, seed: int) -> DSEEConfig:
    """The flags as settings of an injection; query and value are found by the model's own names for them.

    A fused projection is adapted as one matrix with 2N entries: as many trained values as two matrices of a
    third its height would have.
    """
    targets = flags.lora_target_modules or _query_and_value(model)
    count, slices = flags.num_sparse, {}
    if "c_attn" in targets:
        slices = {"c_attn": ("q", "v")}
    elif "in_proj" in targets:
        count *= 2
    return DSEEConfig(
        rank=flags.lora_r,
        alpha=flags.lora_alpha,
        num_sparse=count if flags.apply_sparse and count else None,
        target_modules=tuple(targets),
        output_slices=slices,
        support=SUPPORTS[flags.sparse_method],  # type: ignore[arg-type]
        decomposition=DecompositionConfig(preset=flags.grebsmo_preset),
        trained_modules=tuple(head_modules(model)),
        seed=seed,
    )


def head_modules(model: nn.Module) -> list[str]:
    """What stands beside the encoder: the classifier, and a pooler where it is not the encoder's own."""
    return [
        name
        for name, module in model.named_children()
        if name != getattr(model, "base_model_prefix", None) and any(True for _ in module.parameters())
    ]


def prune_configs(model: nn.Module, settings: GlueSettings) -> list[PruneConfig]:
    """The flags as prunings: the matrices with an update by the mode, the others by |W|, heads by the mode."""
    flags, seed = settings.pruning, int(settings.training.get("seed", 42))
    modules = (*block_linears(model), *_frozen_pooler(model))
    found = []
    if flags.prune_heads_num:
        found.append(
            PruneConfig(
                pattern="heads", num_per_layer=flags.prune_heads_num, score=flags.prune_mode, seed=seed
            )
        )
    if flags.ad_pruning_ratio:
        pool = Pool(name="adapted", select="adapted", sparsity=flags.ad_pruning_ratio)
        found.append(
            PruneConfig(score=flags.prune_mode, pools=(pool,), modules=modules, seed=seed, mask_update=False)
        )
    if flags.pruning_ratio:
        pool = Pool(name="others", select="others", sparsity=flags.pruning_ratio)
        found.append(PruneConfig(score="W", pools=(pool,), modules=modules))
    return found


def prune_model(model: nn.Module, settings: GlueSettings) -> PruneReport | None:
    """Collective. Set to zero what the flags say, before the engine is made."""
    configs = prune_configs(model, settings)
    if not configs:
        return None
    return prune(model, configs)


def _adapter_folder(model: ModelArguments) -> Path | None:
    for name in (model.lora_path, model.model_name_or_path):
        if name is None:
            continue
        folder = Path(name)
        for candidate in (folder / ADAPTER_FOLDER, folder):
            if (candidate / CONFIG_FILE).is_file():
                return candidate
        if name == model.lora_path:
            raise ConfigError(f"--lora_path {name} holds no adapter; expected a folder with {CONFIG_FILE}")
    return None


def _holds_adapter(model: ModelArguments) -> bool:
    folder = Path(model.model_name_or_path)
    return any((where / CONFIG_FILE).is_file() for where in (folder / ADAPTER_FOLDER, folder))


def _check_same(settings: GlueSettings, record: AdapterRecord, folder: Path) -> None:
    """Flags that were given must be the tuned model's."""
    saved = record.config
    if saved is None:
        raise ConfigError(f"{folder} holds masks without an adapter; give a folder that this program wrote")
    flags = settings.model
    factor = 2 if "in_proj" in saved.target_modules else 1
    pairs: dict[str, tuple[float, float]] = {
        "lora_r": (flags.lora_r, saved.rank),
        "lora_alpha": (flags.lora_alpha, saved.alpha),
    }
    if flags.apply_sparse:
        pairs["num_sparse"] = (flags.num_sparse * factor, saved.num_sparse or 0)
    differing = [
        f"--{name} {ours:g}, there {theirs:g}"
        for name, (ours, theirs) in pairs.items()
        if name in settings.given and ours != theirs
    ]
    if differing:
        raise ConfigError(f"{folder} was tuned with other settings: {'; '.join(differing)}")


def _query_and_value(model: nn.Module) -> Sequence[str]:
    suffixes = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if linear_kind(module)}
    for pair in QUERY_AND_VALUE:
        if suffixes.issuperset(pair):
            return pair
    for name in FUSED:
        if name in suffixes:
            return (name,)
    raise ConfigError(
        f"query and value of {type(model).__name__} are not known by name; give --lora_target_modules, e.g. some of "
        f"{', '.join(sorted(suffixes))}"
    )


def _frozen_pooler(model: nn.Module) -> list[str]:
    """The encoder's own pooler, which the repository counts among the other matrices."""
    prefix = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, module in model.named_modules()
        if name == f"{prefix}.pooler.dense" and linear_kind(module)
    ]


def _own_order(config: Any, classes: Sequence[str]) -> list[str]:
    """The classes in the order that a pretrained classifier has them, if it is one for these classes."""
    own = {str(name).lower(): int(index) for name, index in (config.label2id or {}).items()}
    if sorted(own) == sorted(name.lower() for name in classes):
        return sorted(classes, key=lambda name: own[name.lower()])
    return list(classes)


def _hub(model: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model.cache_dir,
        "trust_remote_code": False,
        "revision": model.model_revision,
        "token": True if model.use_token else None,
    }
