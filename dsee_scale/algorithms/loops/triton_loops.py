"""The inner loops of exact selection in Triton, for a GPU: each pass reads an entry once and keeps nothing of it.

The twin of `TorchLoops`, with the same results: counts are integers, so the order of the atomic additions does not
show. Runs on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1, set before the first import).

Floats crowd: some thousand values of the high digit hold nearly all entries of a weight. So that digit is counted in
private copies of the histogram, which the programs share by turns. Zero, the commonest of digits (of pruned weights;
of the low halves of what was bfloat16), is added up within a program first. In a narrow window every digit is, so that
an entry costs no atomic addition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsee_scale.algorithms.bits import INTEGERS
from dsee_scale.algorithms.current_gpu import on_its_gpu
from dsee_scale.algorithms.loops.protocol import BINS, INFINITY_DIGIT, Window

BLOCK = 4096
"""Entries per program."""
COPIES = 16
"""Private histograms at most,"""
COPY_FROM = 2**20
"""each for as many entries: filling and adding one up moves 1/4 byte for each of them."""
AT_ONCE = 2**30
"""Entries counted in int32."""
WIDEST = 64
"""Digits of a window that are added up one after the other at most."""
ALIGNED = 16
"""Bytes at whose multiples the widest loads begin."""


class TritonLoops:
    """GPU tensors only; see `Loops` for what each method does."""

    def count_digits(
        self, ranked: Tensor, shift: int, prefix: int, histogram: Tensor, window: Window | None = None
    ) -> None:
        """See Loops."""
        if not ranked.numel():
            return
        if window is not None and window[1] - window[0] <= WIDEST:
            _launch_window(_words(ranked), histogram, shift, *window)
            return
        if shift + 16 < 8 * ranked.element_size():
            _launch_digits(_words(ranked), histogram, shift, prefix, copies=1, within=True)
            return
        for part in _words(ranked).split(AT_ONCE):
            copies = max(1, min(COPIES, part.numel() // COPY_FROM))
            # The sign is no part of a key: half of the digits do not occur.
            counts = torch.zeros(copies, BINS // 2, dtype=torch.int32, device=part.device)
            _launch_digits(part, counts, shift, 0, copies=copies, within=False)
            histogram[: BINS // 2] += counts.sum(0)

    def count_ties(self, ranked: Tensor, key: int, offset: int, shift: int, histogram: Tensor) -> None:
        """See Loops."""
        if ranked.numel():
            _launch_ties(_words(ranked), histogram, key, offset, shift)

    def zero_up_to_(self, weight: Tensor, ranked: Tensor, last: int) -> int | Tensor:
        """See Loops. Blocks of which nothing goes are not written."""
        if not weight.numel():
            return 0
        removed = torch.zeros((), dtype=torch.int64, device=weight.device)
        _launch_zero(_words(weight), _words(ranked), removed, last)
        torch.autograd.graph.increment_version(weight)  # as torch's operators do: a backward pass may need it
        return removed


def _words(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def _magnitude(words: Tensor) -> int:
    """All bits of an entry but the sign."""
    return torch.iinfo(words.dtype).max


def _from_boundary(words: Tensor) -> tuple[Tensor, int]:
    """The words from the aligned address before them on, and how many that are more.

    Shards, and parts before or after a cut, begin anywhere; without a boundary each load would fetch one entry.
    """
    lead = words.data_ptr() % ALIGNED // words.element_size()
    if lead > words.storage_offset():
        return words, 0
    return words.as_strided((words.numel() + lead,), (1,), words.storage_offset() - lead), lead


@on_its_gpu
def _launch_digits(
    words: Tensor, counts: Tensor, shift: int, prefix: int, *, copies: int, within: bool
) -> None:
    magnitude = _magnitude(words)
    words, lead = _from_boundary(words)
    _digits[(triton.cdiv(words.numel(), BLOCK),)](
        words, counts, lead, words.numel(), shift, prefix, copies, counts.stride(0),
        MAGNITUDE=magnitude, WITHIN=within, BLOCK=BLOCK,
    )  # fmt: skip


@on_its_gpu
def _launch_window(words: Tensor, histogram: Tensor, shift: int, low: int, high: int) -> None:
    magnitude = _magnitude(words)
    words, lead = _from_boundary(words)
    _window[(triton.cdiv(words.numel(), BLOCK),)](
        words, histogram, lead, words.numel(), shift, low, high,
        MAGNITUDE=magnitude, INFINITY=INFINITY_DIGIT, BLOCK=BLOCK,
    )  # fmt: skip


@on_its_gpu
def _launch_ties(words: Tensor, histogram: Tensor, key: int, offset: int, shift: int) -> None:
    magnitude = _magnitude(words)
    words, lead = _from_boundary(words)
    _ties[(triton.cdiv(words.numel(), BLOCK),)](
        words, histogram, lead, words.numel(), key, offset - lead, shift,
        MAGNITUDE=magnitude, WIDE=1 << shift >= BLOCK, BLOCK=BLOCK,
    )  # fmt: skip


@on_its_gpu
def _launch_zero(words: Tensor, ranks: Tensor, removed: Tensor, last: int) -> None:
    own, magnitude, lead = words.data_ptr() == ranks.data_ptr(), _magnitude(ranks), 0
    if own:
        words, lead = _from_boundary(words)
        ranks = words
    _zero[(triton.cdiv(words.numel(), BLOCK),)](
        words, ranks, removed, lead, words.numel(), last, MAGNITUDE=magnitude, OWN=own, BLOCK=BLOCK
    )


@triton.jit
def _load(words, at, lead, stop, BLOCK: tl.constexpr):
    """Entries from `at` on, those before `lead` or from `stop` on as 0; a mask would divide wide loads."""
    offsets = at + tl.arange(0, BLOCK)
    if (at >= lead) & (at + BLOCK <= stop):
        word = tl.load(words + offsets)
    else:
        word = tl.load(words + offsets, mask=(offsets >= lead) & (offsets < stop), other=0)
    return word


@triton.jit(do_not_specialize=["lead", "stop", "shift", "prefix", "copies"])
def _digits(
    words, counts, lead, stop, shift, prefix, copies, stride,
    MAGNITUDE: tl.constexpr, WITHIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = at + tl.arange(0, BLOCK)
    key = _load(words, at, lead, stop, BLOCK).to(tl.int32) & MAGNITUDE
    here = (offsets >= lead) & (offsets < stop)
    if WITHIN:
        here = here & ((key >> (shift + 16)) == prefix)
    digit = (key >> shift) & 0xFFFF
    copy = counts + (tl.program_id(0) % copies) * stride
    _add_count(copy, here, digit, 0)
    ones = tl.full((BLOCK,), 1, counts.dtype.element_ty)
    tl.atomic_add(copy + digit, ones, mask=here & (digit != 0), sem="relaxed")


@triton.jit(do_not_specialize=["lead", "stop", "shift", "low", "high"])
def _window(
    words, histogram, lead, stop, shift, low, high,
    MAGNITUDE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = at + tl.arange(0, BLOCK)
    digit = (_load(words, at, lead, stop, BLOCK).to(tl.int32) & MAGNITUDE) >> shift
    here = (offsets >= lead) & (offsets < stop)
    digit = tl.where(digit > INFINITY, INFINITY + 1, tl.minimum(tl.maximum(digit, low), high))
    for each in range(low, high + 1):
        _add_count(histogram, here, digit, each)
    _add_count(histogram, here, digit, INFINITY + 1)


@triton.jit
def _add_count(histogram, here, digit, each):
    count = tl.sum((here & (digit == each)).to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(histogram + each, count.to(histogram.dtype.element_ty), sem="relaxed")


@triton.jit(do_not_specialize=["lead", "stop", "key", "offset", "shift"])
def _ties(
    words, histogram, lead, stop, key, offset, shift,
    MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = at + tl.arange(0, BLOCK)
    found = (_load(words, at, lead, stop, BLOCK).to(tl.int32) & MAGNITUDE) == key
    found = found & (offsets >= lead) & (offsets < stop)
    bins = (offsets + offset) >> shift
    if WIDE:  # a block's entries lie in one bin or in two
        first = (at + offset) >> shift
        total = tl.sum(found.to(tl.int32), 0)
        before = tl.sum((found & (bins == first)).to(tl.int32), 0)
        if before > 0:
            tl.atomic_add(histogram + first, before.to(tl.int64), sem="relaxed")
        if total > before:
            tl.atomic_add(histogram + first + 1, (total - before).to(tl.int64), sem="relaxed")
    else:
        tl.atomic_add(histogram + bins, tl.full((BLOCK,), 1, tl.int64), mask=found, sem="relaxed")


@triton.jit(do_not_specialize=["lead", "stop", "last"])
def _zero(
    words, ranks, removed, lead, stop, last,
    MAGNITUDE: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = at + tl.arange(0, BLOCK)
    rank = _load(ranks, at, lead, stop, BLOCK)
    gone = ((rank.to(tl.int32) & MAGNITUDE) <= last) & (offsets >= lead) & (offsets < stop)
    count = tl.sum(gone.to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(removed, count.to(tl.int64), sem="relaxed")
        word = rank
        if not OWN:
            word = _load(words, at, lead, stop, BLOCK)
        word = tl.where(gone, 0, word)
        if (at >= lead) & (at + BLOCK <= stop):
            tl.store(words + offsets, word)
        else:
            tl.store(words + offsets, word, mask=(offsets >= lead) & (offsets < stop))
