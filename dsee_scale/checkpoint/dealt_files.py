"""Tensors dealt out over several files, each written by one rank, all at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dsee_scale.checkpoint.files import NewFolder, alike
from dsee_scale.checkpoint.tensor_file import TensorSpec, TensorWriter, file_metadata
from dsee_scale.partition.port import Partition

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
    """Collective. Write tensors of one dtype batch by batch; of each batch every rank writes a share.

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
    with alike(partition):
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
    with alike(partition):
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
