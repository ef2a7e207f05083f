"""Which tensors an exported model has, under which names, in which files: decided before any weight moves."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.folder import NewFolder
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.checkpoint.tensors import (
    ScatteredWriter,
    TensorSpec,
    TensorWriter,
    aligned,
    file_metadata,
)
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import ConfigError
from dsee_scale.export.sparse import KIND, compress, compressed_specs, kept_entries, pays
from dsee_scale.export.sparse import STEM as SPARSE
from dsee_scale.export.structure import Structure
from dsee_scale.partition import Partition
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


Format = Literal["dense", "sparse"]
NOTHING_SPARSE = (
    "format 'sparse' needs pruned weights, and no weight of the export is sparse; prune first, use "
    "delta 'masked', or format 'dense'"
)
LOADER = "dsee_scale.load_pretrained"
COMPRESSED = "its weights are compressed"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredForm:
    """What becomes of a parameter on its way into a file.

    Attributes:
        structure: heads and neurons that are cut out; None for none.
        num_kept: entries to store of each weight that may be compressed, by name; empty for dense files.
    """

    structure: Structure | None = None
    num_kept: Mapping[str, int] = field(default_factory=dict)

    def dense_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """A parameter's shape without what was removed."""
        return self._smaller(spec).shape

    def specs(self, spec: TensorSpec) -> list[TensorSpec]:
        """What the file holds of a parameter, known before any value is read."""
        smaller = self._smaller(spec)
        return compressed_specs(smaller, self.num_kept[spec.name]) if self._compresses(smaller) else [smaller]

    def tensors(self, name: str, value: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """The file's tensors.

        Args:
            name: the parameter's.
            value: what it is to be, whole.
            masked: the weight before an update was put in, whose bits tell what is kept; or `value` itself.
        """
        if self.structure is not None:
            value, masked = self.structure.shrink(name, value), self.structure.shrink(name, masked)
        if self._compresses(TensorSpec(name, value.dtype, tuple(value.shape))):
            return compress(name, value, kept_entries(masked))
        return {name: value}

    def _smaller(self, spec: TensorSpec) -> TensorSpec:
        shape = self.structure.shape(spec.name, spec.shape) if self.structure else spec.shape
        return TensorSpec(spec.name, spec.dtype, shape)

    def _compresses(self, spec: TensorSpec) -> bool:
        return spec.name in self.num_kept and pays(spec, self.num_kept[spec.name])


def masked_weights(pruned: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of weights whose zeros are a mask on their entries.

    Where only heads or neurons went, the update is zero too, and a weight that is 0 by chance is no mask.
    """
    return {name for name, how in pruned.items() if how.get("pattern") not in UNIT_PATTERNS}


def count_kept(partition: Partition, module: nn.Module, delta: str) -> dict[str, int]:
    """Collective. Entries whose bits are not all zero, of each pruned weight that stays sparse in the files.

    Raises:
        ConfigError: there is none.
    """
    params = dict(module.named_parameters())
    layers, masked = adapted_layers(module), masked_weights(model_state(module).pruned)
    names = [
        name
        for name in model_state(module).pruned
        if name in masked
        and len(partition.shape(params[name])) == 2
        and not (delta == "dense" and name.removesuffix(".weight") in layers)
    ]
    if not names:
        raise ConfigError(NOTHING_SPARSE)
    counts = [int(kept_entries(partition.shard(params[name]).data).sum()) for name in names]
    total = partition.sum_over_shards(torch.tensor(counts, dtype=torch.int64))
    return dict(zip(names, total.tolist(), strict=True))


def write_index(new: NewFolder, files: Mapping[str, list[TensorSpec]], num_parameters: int) -> None:
    """The index that stock transformers needs of several dense files. Local."""
    if len(files) == 1 or any(name.startswith(SPARSE) for name in files):
        return
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    weight_map = {spec.name: file for file, specs in files.items() for spec in specs}
    metadata = {"total_parameters": num_parameters, "total_size": total}
    new.write_json(INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def part_names(stem: str, count: int) -> list[str]:
    """Names of a model's weight files, as transformers has them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def patterns_of(how: Mapping[str, Any]) -> list[str]:
    """What a record says was done to one weight: the units it lost, and the pattern of its zeros."""
    units = [kind for kind in UNIT_PATTERNS if kind in how]
    return list(dict.fromkeys([*units, str(how.get("pattern"))]))


def count_patterns(pruned: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Number of pruned weights of each pattern, those with heads or neurons removed counted under it too."""
    weights = [how for name, how in pruned.items() if not name.endswith(".bias")]
    return dict(collections.Counter(pattern for how in weights for pattern in patterns_of(how)))


def how_to_load(form: StoredForm, reason: str | None) -> dict[str, Any]:
    """Fields of a report: what was cut out, and what loads the folder.

    Args:
        form: in which the tensors are written.
        reason: why no config of the stock class has the smaller shapes; None if there is one.
    """
    reason = COMPRESSED if form.num_kept else reason
    return {
        "structure": form.structure.summary() if form.structure else None,
        "num_removed": form.structure.num_removed if form.structure else 0,
        "loads_with": LOADER if reason else "transformers",
        "reason": reason,
    }


def weight_writer(new: NewFolder, name: str, specs: list[TensorSpec]) -> TensorWriter | ScatteredWriter:
    """A weight file in the making: in the order of the specs, or for compressed weights in any order."""
    if name.startswith(SPARSE):
        return ScatteredWriter(new, name, aligned(specs), file_metadata(KIND))
    return TensorWriter(new, name, specs, {"format": "pt"})
