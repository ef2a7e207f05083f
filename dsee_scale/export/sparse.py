"""Sparse weights in small files: a bit for every entry and the values of those that are kept.

The layout is that of the compressed-tensors library's `sparse-bitmask`. A weight `layer.weight` of R x C
becomes four tensors in a safetensors file:

    layer.shape         (2,) int64, R and C
    layer.bitmask       (R, ceil(C / 8)) uint8, 1 where an entry is kept, the first one in the lowest bit
    layer.compressed    (kept,) in the weight's dtype, row after row
    layer.row_offsets   (R,) int64, where each row begins in `compressed`

At 50% that is 0.5 + 1/16 of a bfloat16 weight and 8 bytes a row. An entry counts as kept if its bits are
not all zero, so that what is read back is what was written, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsee_scale.algorithms.bits import INTEGERS
from dsee_scale.checkpoint.folder import StoredFolder
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec
from dsee_scale.errors import FormatError

STEM = "dsee_sparse"
KIND = "sparse-bitmask"
PARTS = ("compressed", "row_offsets", "shape", "bitmask")
"""Suffixes in the order in which they are written."""
_ENDING = ".weight"


def kept_entries(weight: Tensor) -> Tensor:
    """Where a weight's bits are not all zero, bool in its shape. A -0.0 counts as kept."""
    return weight.detach().contiguous().view(INTEGERS[weight.element_size()]) != 0


def compressed_specs(spec: TensorSpec, num_kept: int) -> list[TensorSpec]:
    """The four tensors that stand for a weight."""
    rows, columns = spec.shape
    prefix = spec.name.removesuffix(_ENDING)
    return [
        TensorSpec(f"{prefix}.compressed", spec.dtype, (num_kept,)),
        TensorSpec(f"{prefix}.row_offsets", torch.int64, (rows,)),
        TensorSpec(f"{prefix}.shape", torch.int64, (2,)),
        TensorSpec(f"{prefix}.bitmask", torch.uint8, (rows, -(-columns // 8))),
    ]


def pays(spec: TensorSpec, num_kept: int) -> bool:
    """Whether a tensor can be compressed, and is smaller then."""
    fits = len(spec.shape) == 2 and spec.name.endswith(_ENDING) and spec.dtype.is_floating_point
    return fits and sum(part.nbytes for part in compressed_specs(spec, num_kept)) < spec.nbytes


def compress(name: str, weight: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """The four tensors of a weight, by name.

    Args:
        name: of the weight, ending in `.weight`.
        weight: (R, C).
        kept: (R, C) bool, what to store; zeros elsewhere. None stores what has any bit set.
    """
    kept = kept_entries(weight) if kept is None else kept
    counts = kept.sum(dim=1)
    prefix = name.removesuffix(_ENDING)
    bits = np.packbits(kept.cpu().numpy(), axis=-1, bitorder="little")
    return {
        f"{prefix}.compressed": weight.detach()[kept],
        f"{prefix}.row_offsets": counts.cumsum(0) - counts,
        f"{prefix}.shape": torch.tensor(weight.shape),
        f"{prefix}.bitmask": torch.from_numpy(bits),
    }


def decompress(parts: Mapping[str, Tensor], where: str) -> Tensor:
    """The weight from its four tensors, by suffix.

    Args:
        parts: `compressed`, `row_offsets`, `shape` and `bitmask`.
        where: file and weight, for errors.

    Raises:
        FormatError: they contradict one another.
    """
    values, bits = parts["compressed"], parts["bitmask"]
    shape = parts["shape"].tolist()
    if len(shape) != 2 or tuple(bits.shape) != (shape[0], -(-shape[1] // 8)) or bits.dtype != torch.uint8:
        raise FormatError(f"{where}: a bit mask of {tuple(bits.shape)} does not fit the shape {shape}")
    unpacked = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(unpacked[:, : shape[1]].view(np.bool_))
    counts = kept.sum(dim=1)
    offsets = parts["row_offsets"]
    if unpacked[:, shape[1] :].any() or not torch.equal(offsets, counts.cumsum(0) - counts):
        raise FormatError(f"{where}: the bit mask and the offsets of its rows contradict each other")
    if values.shape != (int(counts.sum()),):
        raise FormatError(f"{where}: {values.numel()} values for {int(counts.sum())} bits of the mask")
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values
    return weight


class SparseReader:
    """Weights of sparse and dense files alike, whole and by their own names, read when asked for."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        found = [name.removesuffix(".compressed") for name in reader.names() if name.endswith(".compressed")]
        self._compressed = {f"{prefix}{_ENDING}" for prefix in found}

    @classmethod
    def of(cls, folder: StoredFolder) -> SparseReader:
        """The sparse weight files of an exported folder, their format version checked.

        Raises:
            FormatError: a file is damaged or of an unknown version.
        """
        return cls(TensorReader.of(folder, STEM))

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return self.reader.paths

    def names(self) -> list[str]:
        """Every weight's name, in the order of the files."""
        own = {f"{name.removesuffix(_ENDING)}.{part}" for name in self._compressed for part in PARTS}
        plain = (name for name in self.reader.names() if name not in own)
        return [*sorted(self._compressed), *plain]

    def where(self, name: str) -> Path:
        """The file that holds a weight."""
        compressed = name in self._compressed
        return self.reader.where(f"{name.removesuffix(_ENDING)}.bitmask" if compressed else name)

    def is_compressed(self, name: str) -> bool:
        """Whether a weight is stored as bits and values."""
        return name in self._compressed

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading the values."""
        if name not in self._compressed:
            return self.reader.spec(name)
        prefix = name.removesuffix(_ENDING)
        shape = tuple(self.reader.read(f"{prefix}.shape").tolist())
        return TensorSpec(name, self.reader.spec(f"{prefix}.compressed").dtype, shape)

    def num_kept(self, name: str) -> int:
        """Stored values of a compressed weight."""
        return self.reader.spec(f"{name.removesuffix(_ENDING)}.compressed").shape[0]

    def read(self, name: str) -> Tensor:
        """A whole weight."""
        if name not in self._compressed:
            return self.reader.read(name)
        prefix = name.removesuffix(_ENDING)
        parts = {part: self.reader.read(f"{prefix}.{part}") for part in PARTS}
        return decompress(parts, f"{self.where(name)}: {name}")
