"""safetensors files: written one tensor at a time, so that no file is ever held in memory; read lazily."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsee_scale.algorithms.score import all_finite
from dsee_scale.checkpoint.folder import FORMAT_VERSION, HashedFile, NewFolder, StoredFolder
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import FormatError
from dsee_scale.partition.port import Partition

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a file will hold under one name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def aligned(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order within a file: wider dtypes first, so that every tensor starts at a multiple of its width."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def file_header(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with.

    Raises:
        FormatError: a dtype that the format does not know.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        if spec.dtype not in DTYPE_NAMES:
            raise FormatError(f"{name}: tensor {spec.name} is {spec.dtype}, which safetensors cannot hold")
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorWriter:
    """Writes a safetensors file whose tensors come one after the other, in the order of `specs`."""

    def __init__(
        self, folder: NewFolder, name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self.folder, self.specs, self._next = folder, list(specs), 0
        header = file_header(name, specs, metadata)
        self.file: HashedFile = folder.create(name)
        self.file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; it must be the announced one, whole."""
        spec = self.specs[self._next]
        if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
            raise FormatError(
                f"{self.file.path.name}: tensor {name} ({tensor.dtype}, {tuple(tensor.shape)}) in place of "
                f"{spec.name} ({spec.dtype}, {spec.shape})"
            )
        self._next += 1
        self.file.write(tensor_bytes(tensor))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.file.size

    def close(self) -> None:
        """Finish the file and take it into the folder's manifest."""
        if self._next != len(self.specs):
            raise FormatError(f"{self.file.path.name}: {self.specs[self._next].name} was not written")
        self.folder.add(self.file)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as a file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_metadata(kind: str) -> dict[str, str]:
    """What every safetensors file of ours says about itself."""
    return {"format": "pt", "dsee_format": kind, "dsee_version": str(FORMAT_VERSION)}


def write_tensors(folder: NewFolder, name: str, tensors: Mapping[str, Tensor], *, kind: str) -> None:
    """Write a safetensors file from tensors that are all here. Local."""
    specs = aligned([TensorSpec(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()])
    writer = TensorWriter(folder, name, specs, file_metadata(kind))
    for spec in specs:
        writer.write(spec.name, tensors[spec.name])
    writer.close()


class TensorReader:
    """The tensors of several safetensors files by name, read when asked for.

    Raises:
        FormatError: naming file and tensor, where a file is damaged or a tensor is not as expected.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._handles: dict[str, tuple[Path, Any]] = {}
        self.paths = list(paths)
        for path in paths:
            try:
                handle = safe_open(str(path), framework="pt")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path} is damaged or not a safetensors file: {error}") from error
            for name in names:
                self._handles[name] = (path, handle)

    @classmethod
    def of(cls, folder: StoredFolder, stem: str) -> TensorReader:
        """The files of one stem in a saved folder, their format version checked."""
        reader = cls([folder.path / name for name in folder.names(stem)])
        for path, handle in {id(h): (p, h) for p, h in reader._handles.values()}.values():
            version = (handle.metadata() or {}).get("dsee_version")
            if version != str(FORMAT_VERSION):
                raise FormatError(f"{path} has format version {version!r}, expected {FORMAT_VERSION}")
        return reader

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._handles)

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        self._slice(name)
        return self._handles[name][0]

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape from the file's header; reads no data."""
        view = self._slice(name)
        dtype = view.get_dtype()
        if dtype not in DTYPES:
            raise FormatError(f"{self.where(name)}: tensor {name} has the unknown dtype {dtype}")
        return TensorSpec(name, DTYPES[dtype], tuple(view.get_shape()))

    def expect(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Check a tensor's header.

        Raises:
            FormatError: it is missing, or of another shape or dtype.
        """
        spec = self.spec(name)
        if spec.shape != tuple(shape) or (dtype is not None and spec.dtype != dtype):
            wanted = f"{tuple(shape)}" + (f" of {dtype}" if dtype else "")
            raise FormatError(
                f"{self.where(name)}: tensor {name} is {spec.shape} of {spec.dtype}, expected {wanted}; "
                "the file belongs to another model or another setting"
            )

    def reject_not_finite(self, name: str, values: Tensor) -> None:
        """Refuse values of a tensor of these files that are no numbers.

        Raises:
            FormatError: naming file and tensor.
        """
        if not all_finite(values):
            raise FormatError(
                f"{self.where(name)}: tensor {name} holds values that are not finite; use another copy, or one of an "
                "earlier step"
            )

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._slice(name)[...] if self.spec(name).shape else self._handles[name][1].get_tensor(name)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start:stop of a 1-D tensor."""
        return self._slice(name)[start:stop]

    def _slice(self, name: str) -> Any:
        if name not in self._handles:
            files = ", ".join(str(path) for path in self.paths) or "no file"
            raise FormatError(f"tensor {name} is missing in {files}")
        return self._handles[name][1].get_slice(name)


BATCH_BYTES = 64 << 20


def write_dealt(
    partition: Partition,
    folder: NewFolder,
    stem: str,
    specs: Sequence[TensorSpec],
    produce: Callable[[list[list[str]]], list[Tensor]],
    *,
    files: int,
    kind: str,
) -> None:
    """Collective. Write tensors in their specs' order, batch by batch; of each batch every rank writes a share.

    Extra memory: one batch (64 MiB, or one tensor).

    Args:
        partition: the ranks.
        folder: where to.
        stem: the files are `stem.safetensors`, or `stem-00001-of-00002.safetensors` and so on.
        specs: what to write; each tensor ends up in one file.
        produce: collective; for the names of one batch by file, the whole tensors of this rank's file.
        files: number of files, at most the number of ranks.
        kind: noted in the files.
    """
    names = [[spec.name for spec in batch] for batch in batches(specs)]
    sizes = {spec.name: spec.nbytes for spec in specs}
    shares = [runs({name: sizes[name] for name in batch}, files) for batch in names]
    mine = [share[partition.rank] if partition.rank < files else [] for share in shares]
    writer: TensorWriter | None = None
    with raise_on_all_ranks(partition):
        if any(mine):
            names_here = {name for share in mine for name in share}
            own = [spec for spec in specs if spec.name in names_here]
            writer = TensorWriter(folder, part_name(stem, partition.rank, files), own, file_metadata(kind))
    error: Exception | None = None
    for share, own_names in zip(shares, mine, strict=True):
        tensors = produce(share)
        try:
            for name, tensor in zip(own_names, tensors, strict=True):
                if writer is not None and error is None:
                    writer.write(name, tensor)
        except Exception as caught:  # the other ranks go on to the next batch: follow, then fail together
            error = caught
    with raise_on_all_ranks(partition):
        if error is not None:
            raise error
        if writer is not None:
            writer.close()


def runs(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names by part: contiguous runs of about equal total size, in order."""
    total, done = sum(sizes.values()), 0
    result: list[list[str]] = [[] for _ in range(parts)]
    for name, size in sizes.items():
        result[min(done * parts // max(total, 1), parts - 1)].append(name)
        done += size
    return result


def part_name(stem: str, index: int, files: int) -> str:
    """Name of one of a stem's files."""
    return f"{stem}.safetensors" if files == 1 else f"{stem}-{index + 1:05d}-of-{files:05d}.safetensors"


def batches(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Consecutive tensors of at most 64 MiB together (at least one tensor)."""
    result: list[list[TensorSpec]] = []
    size = BATCH_BYTES
    for spec in specs:
        if size + spec.nbytes > BATCH_BYTES:
            result.append([])
            size = 0
        result[-1].append(spec)
        size += spec.nbytes
    return result
