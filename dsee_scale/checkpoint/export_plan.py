"""Which tensors an exported model has, under which names, in which files: decided before any weight moves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.checkpoint.compressed import STEM as SPARSE
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.checkpoint.stored_form import StoredForm, part_names
from dsee_scale.checkpoint.tensor_file import TensorSpec
from dsee_scale.errors import ConfigError
from dsee_scale.partition.port import Partition
from dsee_scale.partition.quantized import quantised_layers

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Entry:
    """One tensor of the model, and what the files hold of it.

    Attributes:
        name: its name in the model's state dict.
        tensor: parameter (perhaps partitioned away) or buffer.
        outputs: tensors in the file.
        numel: entries of the parameter, without those that the file leaves out because they were removed.
        converted: whether transformers stores it under other names or in another layout.
    """

    name: str
    tensor: Tensor
    outputs: tuple[TensorSpec, ...]
    numel: int
    converted: bool

    def stored(self, model: nn.Module, form: StoredForm, whole: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """The file's tensors, from the whole value and the weight whose bits tell what is kept of it."""
        if not self.converted:
            return form.tensors(self.name, whole, masked)
        return _reverted(model, {self.name: whole.detach()})

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class ExportPlan:
    """Files by name, each with its entries in the order in which they are written."""

    files: dict[str, list[Entry]]

    @property
    def num_entries(self) -> int:
        """Tensors of the model."""
        return sum(map(len, self.files.values()))

    def index(self, num_parameters: int) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        entries = [(file, e) for file, es in self.files.items() for e in es]
        total = sum(entry.nbytes for _, entry in entries)
        weight_map = {spec.name: file for file, entry in entries for spec in entry.outputs}
        return {
            "metadata": {"total_parameters": num_parameters, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }


def plan_export(
    partition: Partition, model: nn.Module, max_shard_size: int | str, form: StoredForm | None = None
) -> ExportPlan:
    """Names, shapes and files as stock `save_pretrained` would choose them. Local; reads no weight.

    Raises:
        ConfigError: compressed files of a model whose stored tensors are not those of its state dict.
    """
    form = form or StoredForm()
    state = saved_state(model)
    metas = {
        name: torch.empty(
            tuple(partition.shape(t)) if isinstance(t, nn.Parameter) else tuple(t.shape),
            dtype=partition.dtype(t) if isinstance(t, nn.Parameter) else t.dtype,
            device="meta",
        )
        for name, t in state.items()
    }
    layout = stored_layout(model, metas)
    if layout is not None and form.num_kept:
        raise ConfigError(
            f"format 'sparse' is not possible here: transformers stores tensors of {type(model).__name__} under "
            "other names; export with format 'dense', then convert that folder with `dsee-scale export`"
        )
    entries = []
    for name, tensor in state.items():
        specs = _specs((layout or {}).get(name, {name: metas[name]}))
        numel = sum(math.prod(form.dense_shape(spec)) for spec in specs)
        outputs = specs if layout else tuple(part for spec in specs for part in form.specs(spec))
        entries.append(Entry(name, tensor, outputs, numel, layout is not None))
    return ExportPlan(_into_files(entries, parse_size(max_shard_size), SPARSE if form.num_kept else "model"))


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
    together = _shapes(_reverted(model, state))
    if together == _shapes(state):
        return None
    try:
        apart = {name: _reverted(model, {name: tensor}) for name, tensor in state.items()}
    except Exception:  # each conversion that lacks a tensor fails in its own way
        return None
    merged = {key: shape for one in apart.values() for key, shape in _shapes(one).items()}
    return apart if merged == together else None


def parse_size(size: int | str) -> int:
    """Bytes of `"2GB"`, `"500MB"`, `"1GiB"` or a number.

    Raises:
        ConfigError: not such a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"max_shard_size {size!r} is no size; expected e.g. '2GB', '500MB' or bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _reverted(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())


def _into_files(entries: list[Entry], limit: int, stem: str) -> dict[str, list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    names = part_names(stem, len(groups))
    # Wider dtypes first: then every tensor starts at a multiple of its width.
    ordered = [sorted(group, key=lambda e: -e.outputs[0].dtype.itemsize) for group in groups]
    return dict(zip(names, ordered, strict=True))
