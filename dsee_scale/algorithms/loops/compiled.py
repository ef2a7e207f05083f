"""The inner loops of exact selection, compiled for one CPU thread by numba (the optional extra `fast`).

The twin of `TorchLoops`, with the same results; benchmarks/masks.py measures both. The loops are
single-threaded because the ranks of a machine share its cores. Compiling takes about a second per process
and is not cached on disk (site-packages may be read-only, or shared by machines that differ), so it is
only begun for a pool where it pays; once begun, every pool uses it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsee_scale.algorithms.loops.protocol import Window

LOAD_FROM = 2**27
"""Entries of a pool from which compiling pays for itself."""

SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def load(num_entries: int, *, insist: bool = False) -> CompiledLoops | None:
    """The compiled loops if they are in use already, if `num_entries` is worth it, or if one insists.

    Returns:
        None where they are not worth it or numba is not installed.

    Raises:
        RuntimeError: one insists and numba cannot be imported.
    """
    if not insist and num_entries < LOAD_FROM and not _compile.cache_info().currsize:
        return None
    found = _compile()
    if insist and found is None:
        raise RuntimeError("compiled loops need numba: pip install 'dsee_scale[fast]'")
    return found


@functools.cache
def _compile() -> CompiledLoops | None:
    try:
        import numba
    except ImportError:
        return None
    return CompiledLoops(numba.njit(nogil=True))


class CompiledLoops:
    """CPU tensors only; see `Loops` for what each method does."""

    def __init__(self, compile_loop: Any) -> None:
        self._digits = compile_loop(_digits)
        self._ties = compile_loop(_ties)
        self._zero_own = compile_loop(_zero_own)
        self._zero_ranked = compile_loop(_zero_ranked)

    def count_digits(
        self, ranked: Tensor, shift: int, prefix: int, histogram: Tensor, window: Window | None = None
    ) -> None:
        """See Loops. Tells all digits apart, which costs nothing here."""
        bits, mask = _words(ranked), np.uint64(_mask(ranked))
        self._digits(bits, mask, np.uint64(shift), np.uint64(prefix), histogram.numpy())

    def count_ties(self, ranked: Tensor, key: int, offset: int, shift: int, histogram: Tensor) -> None:
        """See Loops."""
        bits = _words(ranked)
        word = bits.dtype.type
        self._ties(bits, word(_mask(ranked)), word(key), offset, 1 << shift, histogram.numpy())

    def zero_up_to_(self, weight: Tensor, ranked: Tensor, last: int) -> int:
        """See Loops."""
        bits, ranks = _words(weight), _words(ranked)
        word = ranks.dtype.type
        mask, limit = word(_mask(ranked)), word(last + 1)
        if weight.data_ptr() == ranked.data_ptr():
            return int(self._zero_own(bits, mask, limit))
        return int(self._zero_ranked(bits, ranks, mask, limit))


def _words(tensor: Tensor) -> Any:
    """A contiguous CPU tensor as unsigned words that share its memory."""
    size = tensor.element_size()
    return tensor.detach().view(SIGNED[size]).numpy().view(UNSIGNED[size])


def _mask(tensor: Tensor) -> int:
    """All bits of an entry but the sign."""
    return (1 << (8 * tensor.element_size() - 1)) - 1


def _digits(bits, mask, shift, prefix, counts):  # type: ignore[no-untyped-def]
    """Unsigned 64-bit words throughout: a signed index would be checked for wrap-around each time."""
    above = shift + np.uint64(16)
    low = np.uint64(0xFFFF)
    for i in range(bits.shape[0]):
        word = np.uint64(bits[i]) & mask
        if (word >> above) == prefix:
            counts[(word >> shift) & low] += 1


def _ties(bits, mask, key, offset, width, counts):  # type: ignore[no-untyped-def]
    """One vectorised sum per bin of positions."""
    size = bits.shape[0]
    bin = offset // width
    start = 0
    while start < size:
        stop = min((bin + 1) * width - offset, size)
        found = 0
        for i in range(start, stop):
            found += (bits[i] & mask) == key
        counts[bin] += found
        bin += 1
        start = stop


def _zero_own(bits, mask, limit):  # type: ignore[no-untyped-def]
    """Without a branch, so that it is vectorised. One array: with two that overlap it would not be."""
    below = 0
    for i in range(bits.shape[0]):
        word = bits[i]
        goes = (word & mask) < limit
        below += goes
        bits[i] = 0 if goes else word
    return below


def _zero_ranked(bits, ranks, mask, limit):  # type: ignore[no-untyped-def]
    """The same with keys that lie in memory of their own."""
    below = 0
    for i in range(bits.shape[0]):
        goes = (ranks[i] & mask) < limit
        below += goes
        bits[i] = 0 if goes else bits[i]
    return below
