"""The inner loops of exact selection in torch operators, for any device; nothing is copied but one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsee_scale.algorithms import bits
from dsee_scale.algorithms.bits import CPU_CHUNK, DEVICE_CHUNK, INTEGERS
from dsee_scale.algorithms.loops.protocol import BINS, Window


class TorchLoops:
    """Any device; on the CPU in chunks that stay in a core's cache, on an accelerator without waiting for it."""

    def count_digits(
        self, ranked: Tensor, shift: int, prefix: int, histogram: Tensor, window: Window | None = None
    ) -> None:
        """See Loops. Tells all digits apart, which costs nothing here."""
        for _, key in _keys_in_chunks(ranked):
            inside = (key >> (shift + 16)) == prefix if shift + 16 < 8 * ranked.element_size() else None
            if bits.is_host(key.device):
                key = key if inside is None else key[inside]
                histogram += torch.bincount((key >> shift) & (BINS - 1), minlength=BINS)
            else:  # others add 0 to the bin of their low bits, where no two are likely to meet
                ones = torch.ones_like(key) if inside is None else inside.to(key.dtype)
                histogram.scatter_add_(0, ((key >> shift) & (BINS - 1)).long(), ones.long())

    def count_ties(self, ranked: Tensor, key: int, offset: int, shift: int, histogram: Tensor) -> None:
        """See Loops."""
        for start, found in _keys_in_chunks(ranked):
            first, skip = divmod(start + offset, 1 << shift)
            if bits.is_host(found.device):
                position = (found == key).nonzero().flatten().add_(skip)
                counts = torch.bincount(position.bitwise_right_shift_(shift))
            else:
                after = -(skip + found.numel()) % (1 << shift)
                tied = torch.nn.functional.pad(found == key, (skip, after))
                counts = tied.view(-1, 1 << shift).sum(dim=1)
            histogram[first : first + counts.numel()] += counts

    def zero_up_to_(self, weight: Tensor, ranked: Tensor, last: int) -> int | Tensor:
        """See Loops. Multiplies bits by 0 or 1: masked_fill_ takes four times as long on the CPU."""
        removed: int | Tensor = 0
        words = _bits(weight)
        for start, key in _keys_in_chunks(ranked):
            kept = key > last
            words[start : start + key.numel()].mul_(kept)
            gone = key.numel() - torch.count_nonzero(kept)
            removed = removed + (int(gone) if bits.is_host(gone.device) else gone)
        return removed


def in_key_width(ranked: Tensor, key_bits: int) -> Iterator[tuple[int, Tensor]]:
    """(offset, part) of `ranked` with `key_bits` bits an entry; a weight of another width goes by chunks.

    A half-precision weight becomes float32, exactly. A float64 weight is rounded to float32.
    """
    if 8 * ranked.element_size() == key_bits:
        yield 0, ranked
        return
    assert ranked.is_floating_point() and key_bits == 32, (
        f"{ranked.dtype} entries in a search over {key_bits}-bit keys"
    )
    chunk = _chunk(ranked)
    for start in range(0, ranked.numel(), chunk):
        yield start, ranked[start : start + chunk].float()


def _keys_in_chunks(ranked: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset, keys) with the keys made from one chunk's bits."""
    words = _bits(ranked)
    magnitude = torch.iinfo(words.dtype).max
    chunk = _chunk(ranked)
    for start in range(0, words.numel(), chunk):
        yield start, words[start : start + chunk] & magnitude


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def _chunk(tensor: Tensor) -> int:
    return CPU_CHUNK if bits.is_host(tensor.device) else DEVICE_CHUNK
