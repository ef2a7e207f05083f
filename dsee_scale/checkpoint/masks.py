"""Masks as packed bits: one bit per entry of a weight, 1 where the entry is kept (W != 0).

The bits stand in the weight's flat order, the first one highest in its byte, as `numpy.packbits` has it. A
shard may start within a byte: every rank packs its own stretch and sends it to the one rank that writes the
weight's mask, which puts the stretches together. Each bit travels once at most, however many ranks there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsee_scale.adapters.state import MaskFiles, model_state
from dsee_scale.algorithms.bits import (
    CPU_CHUNK,
    INTEGERS,
    count_nonzero,
    count_ones,
    multiply_by_bits_,
    nonzero,
)
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec, write_dealt
from dsee_scale.errors import FormatError
from dsee_scale.partition.port import Partition, Shard
from dsee_scale.passes.fingerprint import rounded_sum

STEM = "dsee_masks"
KIND = "masks"
_BLOCK = 1 << 25
"""Entries read from a file, or packed on an accelerator, at once; a multiple of 8."""


def packed_size(numel: int) -> int:
    """Bytes of a mask."""
    return (numel + 7) // 8


def pack_stretch(data: Tensor, start: int, into: np.ndarray) -> int:
    """Set the bits of entries that are not zero.

    Args:
        data: (n,) a stretch of a weight.
        start: position of `data[0]` in the weight's flat order.
        into: (packed_size,) uint8, whose bits of this stretch are still 0.

    Returns:
        How many they are.
    """
    at, kept, most = 0, 0, CPU_CHUNK if data.device.type == "cpu" else _BLOCK
    while at < data.numel():
        first = start + at
        count = min(most - first % 8, data.numel() - at)
        bits = nonzero(data[at : at + count])
        packed = pack_bits(bits, first % 8).cpu().numpy()
        into[first // 8 : first // 8 + packed.size] |= packed
        kept += count_nonzero(bits)
        at += count
    return kept


def pack_bits(bits: Tensor, skip: int = 0) -> Tensor:
    """Booleans as `numpy.packbits` packs them, after `skip` zeros; on their device."""
    if skip:
        bits = torch.cat([bits.new_zeros(skip), bits])
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy()))
    return pack_with_torch(bits)


def unpack_bits(packed: Tensor, skip: int, count: int) -> Tensor:
    """`count` bits after the first `skip` ones, as booleans; on their device."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=skip + count)
        return torch.from_numpy(bits[skip:].view(np.bool_))
    return unpack_with_torch(packed)[skip : skip + count]


def pack_with_torch(bits: Tensor) -> Tensor:
    """`numpy.packbits` on any device."""
    whole = nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (whole * _places(bits.device)).sum(1, dtype=torch.uint8)


def unpack_with_torch(packed: Tensor) -> Tensor:
    """`numpy.unpackbits` on any device, as booleans."""
    return (packed[:, None] & _places(packed.device)).view(-1) != 0


def _places(device: torch.device) -> Tensor:
    """Value of each bit of a byte, the first one highest."""
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


def deal_masks(
    partition: Partition, shares: Sequence[Sequence[nn.Parameter]]
) -> tuple[list[Tensor], list[int]]:
    """Collective. The bits of weights, each on the one rank that writes them.

    Every rank packs its own stretches; nothing else travels. Extra memory: the bits of this rank's stretches, and of
    the weights that it gets.

    Args:
        partition: the ranks.
        shares: the weights that rank 0, rank 1, ... gets; further ranks get none.

    Returns:
        (packed_size,) uint8 of each weight of this rank's share, on the CPU; and for every weight of all shares, in
        order, how many entries this rank's stretch of it keeps.
    """
    kept: list[int] = []
    pieces = [_packed_stretches(partition, share, kept) for share in shares]
    pieces += [torch.empty(0, dtype=torch.uint8)] * (partition.world_size - len(pieces))
    own = shares[partition.rank] if partition.rank < len(shares) else []
    masks = [np.zeros(packed_size(math.prod(partition.shape(param))), dtype=np.uint8) for param in own]
    for piece in partition.send_pieces(pieces):
        at, stretches = 0, piece.numpy()
        for mask in masks:
            first, size = stretches[at : at + 16].view(np.int64)
            mask[first : first + size] |= stretches[at + 16 : at + 16 + size]
            at += 16 + size
    return [torch.from_numpy(mask) for mask in masks], kept


def _packed_stretches(partition: Partition, weights: Sequence[nn.Parameter], kept: list[int]) -> Tensor:
    """Local. Of each weight: index of the first byte and number of bytes (int64), and the bytes."""
    parts = []
    for param in weights:
        shard = partition.shard(param)
        first = shard.start // 8
        bits = np.zeros(packed_size(shard.start + shard.data.numel()) - first, dtype=np.uint8)
        kept.append(pack_stretch(shard.data, shard.start % 8, bits))
        parts += [np.array([first, bits.size]).view(np.uint8), bits]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8)


def save_masks(
    partition: Partition, folder: NewFolder, weights: Mapping[str, nn.Parameter], files: int
) -> dict[str, int]:
    """Collective. Write the masks of weights into `files` files, each by one rank; how many entries each keeps."""
    specs = [
        TensorSpec(name, torch.uint8, (packed_size(math.prod(partition.shape(param))),))
        for name, param in weights.items()
    ]
    kept: list[int] = []

    def produce(shares: list[list[str]]) -> list[Tensor]:
        masks, counts = deal_masks(partition, [[weights[name] for name in share] for share in shares])
        kept.extend(counts)
        return masks

    write_dealt(partition, folder, STEM, specs, produce, files=files, kind=KIND)
    total = partition.sum_over_shards(torch.tensor(kept, dtype=torch.int64, device=partition.device))
    return dict(zip(weights, total.tolist(), strict=True))


def check_masks(reader: TensorReader, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compare the masks' headers with the weights' true shapes. Local.

    Raises:
        FormatError: a mask is missing or of another size.
    """
    for name, shape in shapes.items():
        reader.expect(name, (packed_size(math.prod(shape)),), torch.uint8)


def check_kept(reader: TensorReader, name: str, shape: Sequence[int], kept: int) -> None:
    """Count a mask's bits. Local.

    Raises:
        FormatError: they are not as many as the record says.
    """
    numel, found = math.prod(shape), 0
    for at in range(0, numel, _BLOCK):
        stop = min(numel, at + _BLOCK)
        packed = reader.read_range(name, at // 8, packed_size(stop)).numpy()
        packed[-1] &= 0xFF << (-stop % 8) & 0xFF  # what follows the last entry is nobody's
        found += count_ones(packed)
    if found != kept:
        raise FormatError(
            f"{reader.where(name)}: the mask of {name} keeps {found:,} of {numel:,} entries, the record says {kept:,}; "
            "the files are damaged or of different adapters"
        )


def open_masks(folder: StoredFolder) -> TensorReader:
    """The mask files of a saved folder."""
    return TensorReader.of(folder, STEM)


def apply_mask(partition: Partition, param: nn.Parameter, reader: TensorReader, name: str) -> None:
    """Set the entries whose bit is 0 to zero, in every stretch of the weight that is stored here. Local."""
    with partition.edit(param) as stretches:
        for stretch in stretches:
            # By integers of the same width: 0 x NaN is 0, and several times as fast as masked_fill_ on the CPU.
            words = stretch.data.view(INTEGERS[stretch.data.element_size()])
            for at, keep in _keep_blocks(reader, name, stretch.start, words.numel(), words.device):
                multiply_by_bits_(words[at : at + keep.numel()], keep)


def masked_sum(partition: Partition, param: nn.Parameter, reader: TensorReader, name: str) -> int:
    """This rank's part of the checksum (see `fingerprint.contents`) that a weight will have under its mask. Local."""
    shard, total = partition.shard(param), 0
    for at, keep in _keep_blocks(reader, name, shard.start, shard.data.numel(), shard.data.device):
        total += rounded_sum(shard.data[at : at + keep.numel()] * keep, shard.start + at)
    return (total + 2**63) % 2**64 - 2**63


def _keep_blocks(
    reader: TensorReader, name: str, start: int, length: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(offset, kept) over entries start : start + length, as many at once as suit the device."""
    most = CPU_CHUNK if device.type == "cpu" else _BLOCK
    at = 0
    while at < length:
        first = start + at
        count = min(_BLOCK - first % 8, length - at)
        packed = reader.read_range(name, first // 8, packed_size(first + count)).to(device)
        for begin in range(0, count, most):
            skip = first % 8 + begin
            yield at + begin, unpack_bits(packed[skip // 8 :], skip % 8, min(most, count - begin))
        at += count


SAMPLED = 1024
"""Entries of a shard that are looked at, to notice weights that were changed from outside."""


def link_masks(partition: Partition, new: NewFolder, module: nn.Module) -> dict[str, int] | None:
    """Collective. Take a model's masks from the files that have them, each rank a share.

    Returns:
        Number of entries that each pruned weight keeps; None, and nothing was done, where some rank can't do it.
    """
    saved = known_files(partition, module)
    mine: list[str] = []
    failed = saved is None
    if saved is not None:
        mine = list(saved.files)[partition.rank :: partition.world_size]
        try:
            for name in mine:
                new.link(name, saved.folder / name, saved.files[name])
        except OSError:  # e.g. that checkpoint was deleted
            failed = True
    if int(partition.sum_over_ranks(torch.tensor([failed]).int())):
        for name in mine:
            new.unlink(name)
        return None
    assert saved is not None
    return dict(saved.kept)


def has_masks(partition: Partition, module: nn.Module, stored: StoredFolder) -> bool:
    """Collective. Whether a model has the masks of a saved folder already, so that they need not be applied."""
    known = known_files(partition, module)
    here = known is not None and known.files == {name: stored.files[name] for name in stored.names(STEM)}
    return not int(partition.sum_over_ranks(torch.tensor([not here]).int()))


def masks_now(partition: Partition, module: nn.Module, kept: Mapping[str, int]) -> MaskFiles | None:
    """Local. A model's masks as they are, for `note_files` once they are saved.

    None where there are none, and for quantised weights, which would be decoded each time to see if they are the same.
    """
    weights = _pruned(module)
    if not weights or any(id(param) in partition.codecs for param in weights.values()):
        return None
    return MaskFiles(Path(), {}, dict(kept), model_state(module).prunings, _sample(partition, weights))


def note_files(module: nn.Module, masks: MaskFiles | None, stored: StoredFolder) -> None:
    """Local. Remember that a saved folder holds these masks."""
    files = {name: stored.files[name] for name in stored.names(STEM)}
    model_state(module).masks = (
        None if masks is None else dataclasses.replace(masks, folder=stored.path.resolve(), files=files)
    )


def known_files(partition: Partition, module: nn.Module) -> MaskFiles | None:
    """Local. The files that hold a model's masks as they are, as far as is known."""
    saved, weights = model_state(module).masks, _pruned(module)
    if saved is None or saved.prunings != model_state(module).prunings or saved.kept.keys() != weights.keys():
        return None
    if any(param.requires_grad for param in weights.values()) or saved.sample != _sample(partition, weights):
        return None
    return saved


def _pruned(module: nn.Module) -> dict[str, nn.Parameter]:
    params = dict(module.named_parameters())
    return {name: params[name] for name in model_state(module).pruned if name in params}


def _sample(partition: Partition, weights: Mapping[str, nn.Parameter]) -> list[int]:
    """Local. A number for each weight that tells where some zeros of its shard are.

    A pruning says that masks have changed; this notices weights that someone else has loaded or written since.
    """
    numbers = []
    for param in weights.values():
        shard = partition.shard(param)
        bits = shard.data[_spread(shard)] != 0
        # Read one by one: with parameters on the host, DeepSpeed leaves small ones on the GPU.
        numbers.append(int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum()))
    return numbers


def _spread(shard: Shard) -> Tensor:
    """Indices of at most SAMPLED entries of a shard: one at random in each stretch, other ones in each shard."""
    numel = shard.data.numel()
    if numel <= SAMPLED:
        return torch.arange(numel, device=shard.data.device)
    generator = torch.Generator().manual_seed(shard.start)
    within = torch.randint(numel // SAMPLED, (SAMPLED,), generator=generator)
    return (torch.arange(SAMPLED) * numel // SAMPLED + within).to(shard.data.device)
