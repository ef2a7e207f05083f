"""The form in which an export stores each parameter: whole or without removed units, dense or compressed."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.compressed import KIND, compress, compressed_specs, kept_entries, pays
from dsee_scale.checkpoint.compressed import STEM as SPARSE
from dsee_scale.checkpoint.files import NewFolder
from dsee_scale.checkpoint.structured import Structure
from dsee_scale.checkpoint.tensor_file import (
    ScatteredWriter,
    TensorSpec,
    TensorWriter,
    aligned,
    file_metadata,
)
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import ConfigError
from dsee_scale.partition import Partition

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
