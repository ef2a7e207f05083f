"""Masks as packed bits: one bit per entry of a weight, 1 where the entry is kept (W != 0).

The bits stand in the weight's flat order, the first one highest in its byte, as `numpy.packbits` has it. A
shard may start within a byte: every rank packs its own stretch into a blank array, and the arrays are
summed, since each bit is set by one rank at most. Only bits travel between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dsee_scale.checkpoint.dealt_files import write_dealt
from dsee_scale.checkpoint.files import NewFolder, StoredFolder
from dsee_scale.checkpoint.tensor_file import TensorReader, TensorSpec
from dsee_scale.errors import FormatError
from dsee_scale.partition.port import Partition

STEM = "dsee_masks"
KIND = "masks"
_BLOCK = 1 << 25
"""Entries handled at once; a multiple of 8."""


def packed_size(numel: int) -> int:
    """Bytes of a mask."""
    return (numel + 7) // 8


def pack_stretch(data: Tensor, start: int, into: np.ndarray) -> None:
    """Set the bits of entries that are not zero.

    Args:
        data: (n,) a stretch of a weight.
        start: position of `data[0]` in the weight's flat order.
        into: (packed_size,) uint8, whose bits of this stretch are still 0.
    """
    at = 0
    while at < data.numel():
        first = start + at
        count = min(_BLOCK - first % 8, data.numel() - at)
        bits = (data[at : at + count] != 0).cpu().numpy()
        packed = np.packbits(np.concatenate([np.zeros(first % 8, bool), bits]) if first % 8 else bits)
        into[first // 8 : first // 8 + packed.size] |= packed
        at += count


def unpack_stretch(packed: np.ndarray, skip: int, count: int) -> Tensor:
    """`count` bits after the first `skip` ones, as booleans."""
    return torch.from_numpy(np.unpackbits(packed, count=skip + count)[skip:].view(np.bool_))


def pack_masks(partition: Partition, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """Collective. The bits of weights, whole on every rank, in one transfer.

    Extra memory: numel / 8 bytes of each, and one block of a shard.

    Returns:
        (packed_size,) uint8 of each weight, on the CPU.
    """
    sizes = [packed_size(math.prod(partition.shape(param))) for param in weights]
    bits = np.zeros(sum(sizes), dtype=np.uint8)
    for param, part in zip(weights, np.split(bits, np.cumsum(sizes)[:-1]), strict=True):
        shard = partition.shard(param)
        pack_stretch(shard.data, shard.start, part)
    together = partition.sum_over_shards(torch.from_numpy(bits).to(partition.device))
    return list(together.cpu().split(sizes))


def save_masks(
    partition: Partition, folder: NewFolder, weights: Mapping[str, nn.Parameter], files: int
) -> None:
    """Collective. Write the masks of weights into `files` files, each by one rank."""
    specs = [
        TensorSpec(name, torch.uint8, (packed_size(math.prod(partition.shape(param))),))
        for name, param in weights.items()
    ]

    def produce(names: list[str]) -> list[Tensor]:
        return pack_masks(partition, [weights[name] for name in names])

    write_dealt(partition, folder, STEM, specs, produce, files=files, kind=KIND)


def check_masks(reader: TensorReader, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compare the masks' headers with the weights' true shapes. Local.

    Raises:
        FormatError: a mask is missing or of another size.
    """
    for name, shape in shapes.items():
        reader.expect(name, (packed_size(math.prod(shape)),), torch.uint8)


def open_masks(folder: StoredFolder) -> TensorReader:
    """The mask files of a saved folder."""
    return TensorReader.of(folder, STEM)


def apply_mask(partition: Partition, param: nn.Parameter, reader: TensorReader, name: str) -> None:
    """Set the entries whose bit is 0 to zero, in every stretch of the weight that is stored here. Local.

    Call `partition.written` afterwards.
    """
    for shard in [partition.shard(param), *partition.copies(param)]:
        for at, keep in _keep_blocks(reader, name, shard.start, shard.data.numel()):
            block = shard.data[at : at + keep.numel()]
            block.masked_fill_(~keep.to(block.device), 0)
        shard.commit()


def count_kept(reader: TensorReader, name: str, numel: int) -> int:
    """Number of entries that a mask keeps.

    Raises:
        FormatError: bits are set beyond the last entry.
    """
    kept = sum(int(keep.sum()) for _, keep in _keep_blocks(reader, name, 0, numel))
    last = reader.read_range(name, packed_size(numel) - 1, packed_size(numel))
    if numel % 8 and int(last[0]) & (0xFF >> numel % 8):
        raise FormatError(f"{reader.where(name)}: mask {name} has bits beyond its {numel} entries")
    return kept


def _keep_blocks(reader: TensorReader, name: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
    at = 0
    while at < length:
        first = start + at
        count = min(_BLOCK - first % 8, length - at)
        packed = reader.read_range(name, first // 8, packed_size(first + count))
        yield at, unpack_stretch(packed.numpy(), first % 8, count)
        at += count
