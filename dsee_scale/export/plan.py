"""Which tensors an exported model has, under which names, in which files: decided before any weight moves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from dsee_scale.algorithms.score import HALF_DTYPES
from dsee_scale.checkpoint.files import read_json
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.checkpoint.tensors import TensorSpec
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.export.report import INDEX_FILE
from dsee_scale.export.structure import Structure
from dsee_scale.partition import Partition
from dsee_scale.partition.quantized import quantised_layers

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor of the model, and what the files hold of it.

    Attributes:
        name: its name in the model's state dict.
        outputs: tensors in the file.
        converted: whether transformers stores it under other names or in another layout.
    """

    name: str
    outputs: tuple[TensorSpec, ...]
    converted: bool = False

    @property
    def numel(self) -> int:
        """Entries, without those that the file leaves out because they were removed."""
        return sum(math.prod(spec.shape) for spec in self.outputs)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class ExportPlan:
    """Files by name, each with its entries in the order in which they are written.

    Within a file wider dtypes come first: then every tensor starts at a multiple of its width.
    """

    files: dict[str, list[Entry]]

    def __post_init__(self) -> None:
        for entries in self.files.values():
            entries.sort(key=lambda entry: -entry.outputs[0].dtype.itemsize)

    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`, which stock transformers needs of several files."""
        entries = [(file, entry) for file, entries in self.files.items() for entry in entries]
        sizes = {
            "total_parameters": sum(entry.numel for _, entry in entries),
            "total_size": sum(entry.nbytes for _, entry in entries),
        }
        weight_map = {spec.name: file for file, entry in entries for spec in entry.outputs}
        return {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}


def plan_export(
    partition: Partition, model: nn.Module, max_shard_size: int | str, structure: Structure | None = None
) -> ExportPlan:
    """Names, shapes and files as stock `save_pretrained` would choose them. Local; reads no weight.

    Raises:
        ConfigError: `max_shard_size` is no size.
    """
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ConfigError(
            f"max_shard_size {max_shard_size!r} must be at least 1 byte, or a size such as '2GB'"
        )
    metas = {}
    for name, tensor in saved_state(model).items():
        is_param = isinstance(tensor, nn.Parameter)
        shape = tuple(partition.shape(tensor) if is_param else tensor.shape)  # type: ignore[arg-type]
        shape = structure.shape(name, shape) if structure else shape
        dtype = partition.dtype(tensor) if is_param else tensor.dtype  # type: ignore[arg-type]
        metas[name] = torch.empty(shape, dtype=dtype, device="meta")
    layout = stored_layout(model, metas)
    entries = {
        name: Entry(name, _specs((layout or {}).get(name, {name: meta})), layout is not None)
        for name, meta in metas.items()
    }
    try:
        split = split_state_dict_into_shards_factory(
            entries,  # type: ignore[arg-type]
            get_storage_size=lambda entry: entry.nbytes,  # type: ignore[attr-defined, union-attr]
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"max_shard_size {max_shard_size!r} is not a size, e.g. '2GB' or bytes: {error}"
        ) from error
    return ExportPlan(
        {file: [entries[n] for n in names] for file, names in split.filename_to_tensors.items()}
    )


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, ignored keys, scales of quantised weights, and tied weights' further names."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    quantised = {name for name, _ in quantised_layers(model)}
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
        and not is_adapter_key(name)
        and name not in ignored
        and not (_owner(name) in quantised and not name.endswith((".weight", ".bias")))
    }
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    by_identity: dict[int, list[str]] = {}
    for name, value in state.items():
        by_identity.setdefault(id(value), []).append(name)
    dropped: set[str] = set()
    for names in by_identity.values():
        tied = [name for name in names if name in declared]
        dropped.update(tied[1:] if len(tied) == len(names) else tied)
    return {name: value for name, value in state.items() if name not in dropped}


def loaded_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """In which dtype `from_pretrained` holds each of a model's floating-point tensors, by its name. Local.

    Some classes keep a few in float32, as the bias by which a router chooses experts: rounded, it would choose others.

    Args:
        model: made in that dtype; its weights are not read.
        dtype: of the other tensors.
    """
    kept: list[str] = []
    if dtype in HALF_DTYPES:
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    wide = re.compile("|".join(part.replace("*", ".*") for part in kept)) if kept else None
    own = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}

    def of(name: str) -> torch.dtype:
        return torch.float32 if wide and wide.search(name) else own.get(name, dtype)

    return of


def _owner(name: str) -> str:
    """The layer that a key belongs to: bitsandbytes has `LAYER.SCB` and `LAYER.weight.absmax`."""
    return name.split(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]


def stored_layout(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """Each tensor as the files hold it: transformers renames or splits some (fused experts, old prefixes).

    None means the model's own names: for a model outside of transformers, and where the stored layout would
    need several of the model's tensors at once (`from_pretrained` reads the own names too).
    """
    if not hasattr(model, "save_pretrained"):
        return None
    together = _shapes(reverted(model, state))
    if together == _shapes(state):
        return None
    try:
        apart = {name: reverted(model, {name: tensor}) for name, tensor in state.items()}
    except Exception:  # each conversion that lacks a tensor fails in its own way
        return None
    merged = {key: shape for one in apart.values() for key, shape in _shapes(one).items()}
    return apart if merged == together else None


def reverted(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as transformers stores them. Local."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]


def stored_names(model: nn.Module, name: str) -> list[str] | None:
    """Under which names transformers stores a parameter; None where it is laid out otherwise there. Local."""
    param = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if param is None:
        return [name]
    try:
        stored = reverted(model, {name: param.detach()})
    except Exception:  # each conversion that lacks a tensor fails in its own way
        return None
    whole = len(stored) > 1 or all(tensor.shape == param.shape for tensor in stored.values())
    return list(stored) if whole else None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())


def base_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files: the one that transformers looks for first, else those of the index.

    Raises:
        FormatError: there are none, or one is missing.
    """
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{folder / INDEX_FILE} is damaged: it has no weight_map; use another copy")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = [WEIGHTS_FILE]
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise FormatError(
            f"{folder / INDEX_FILE} names {outside[0]!r}, expected names of files in its folder"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise FormatError(
            f"{folder} holds no {missing[0] if missing else WEIGHTS_FILE}; expected a model folder with safetensors "
            "weights (load the model with transformers and call save_pretrained to convert it)"
        )
    return [folder / name for name in names]
