"""Exact k-th selection over entries that no process holds together: a radix search in fixed-size rounds.

The entries of a pool are ordered by (key, position): the key is an integer that orders like the score
(`score.keys`), the position counts through the pool's weights one after the other and breaks ties. To
remove `num_remove` entries is to find the entry with that rank, the `Cut`, and to zero what lies below.

In each round every rank counts its own entries into 65,536 bins, the counts are summed over ranks, and
all go on inside the bin that holds the rank looked for. The first rounds find the key, 16 bits each (one
round for 16-bit keys, two for 32-bit ones). If the entries that tie at that key must be split, further
rounds count them per block of positions, then inside the chosen block. So a message is 512 KiB whatever
the model's size, and a cut can be applied to any stored copy of a weight with nothing more to say.

A round before the first may count a sample. It says between which digits the cut lies, so that the loops need tell
no others apart; should it turn out to lie elsewhere, the first round is run once more for all digits.

Patterns with a structure (N:M, heads, neurons) choose inside small groups and need no such search; they
belong into a module of their own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsee_scale.algorithms.loops import BINS, INFINITY_DIGIT, Loops, Window, choose_loops, in_key_width

STRETCH, STEP = 2**10, 2**16
"""A sample is the first so many entries of so many,"""
MARGIN = 2**-8
"""and the cut is looked for this share of all entries to either side of where the sample has it."""

Wants = Callable[[int, int], bool]
"""(position, numel) -> whether a block matters in this round."""

Blocks = Callable[[Wants], Iterable[tuple[Tensor, int]]]
"""Called once a round; gives (ranked, position) of the blocks that lie here."""


@dataclass(frozen=True)
class Cut:
    """An entry is removed exactly if (its key, its position) < (key, position), compared in that order.

    Attributes:
        key: key of the first entry that stays.
        position: its place in the pool.
        key_bits: 16 or 32, the width of the keys that it is compared with.
    """

    key: int
    position: int
    key_bits: int


def num_removed(sparsity: float, total: int) -> int:
    """Entries that a sparsity in [0, 1) removes of `total`, rounded as torch.nn.utils.prune rounds."""
    return round(sparsity * total)


class CutSearch:
    """The search for one pool's cut, as a state machine without communication of its own.

        search = CutSearch(num_remove, total, key_bits)
        while search.cut is None:
            for ranked, position in blocks(search.wants):
                search.count(ranked, position)
            search.advance(all_reduce(search.histogram))

    Attributes:
        cut: the result; None until it is found. Every rank finds it in the same round.
    """

    def __init__(
        self,
        num_remove: int,
        total: int,
        key_bits: int,
        *,
        device: torch.device | str = "cpu",
        use_compiled: bool | None = None,
        sampled: bool = False,
    ) -> None:
        """Begin a search; num_remove 0 or total needs no round.

        Args:
            num_remove: entries to remove, 0 to total.
            total: entries of the pool over all ranks.
            key_bits: 16 or 32.
            device: where `histogram` shall lie (for NCCL: the GPU), whatever device the entries are on.
            use_compiled: insist on compiled or plain loops on the CPU; None chooses by `total`.
            sampled: whether a round over a sample comes first; the same on every rank. It pays for large pools on an
                accelerator whose weights are their own keys.
        """
        assert 0 <= num_remove <= total, (num_remove, total)
        assert key_bits in (16, 32), key_bits
        self.cut: Cut | None = None
        self._counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._elsewhere: dict[torch.device, Tensor] = {}
        self._key_bits = key_bits
        self._total = total
        self._use_compiled = use_compiled
        first = _KeyRound(key_bits - 16, 0, total)
        self._round: _SampleRound | _KeyRound | _TieRound = _SampleRound(first) if sampled else first
        self._below = num_remove
        self._expected = total
        if num_remove == 0:
            self._finish(0, 0)
        elif num_remove == total:
            self._finish((1 << (key_bits - 1)) - 1, 0)

    @property
    def histogram(self) -> Tensor:
        """(65536,) int64, this rank's counts of this round."""
        for counts in self._elsewhere.values():
            self._counts += counts.to(self._counts.device)
        self._elsewhere.clear()
        return self._counts

    def wants(self, position: int, numel: int) -> bool:
        """Whether entries position to position + numel matter in this round. Skipping others is allowed."""
        return self.cut is None and self._round.wants(position, numel)

    def count(self, ranked: Tensor, position: int) -> None:
        """Count one block of this rank.

        Args:
            ranked: (n,) contiguous; int16 or int32 keys, or a weight ranked by magnitude, which serves as its
                own keys.
            position: place in the pool of `ranked[0]`.
        """
        if not self.wants(position, ranked.numel()):
            return
        loops = choose_loops(self._total, ranked.device, self._use_compiled)
        here = self._counts
        if ranked.device != here.device:
            here = self._elsewhere.setdefault(ranked.device, torch.zeros_like(here, device=ranked.device))
        for offset, part in in_key_width(ranked, self._key_bits):
            self._round.count(loops, part, position + offset, here)

    def advance(self, summed: Tensor) -> None:
        """End the round with the histogram summed over all ranks; clears `histogram` for the next one.

        Raises:
            ValueError: a score is NaN. Every rank raises it, since all see the same sum.
            RuntimeError: not every entry was counted exactly once.
        """
        assert self.cut is None, "the search is over"
        counts = summed.to("cpu", copy=True)
        self._counts.zero_()
        self._elsewhere.clear()
        if isinstance(self._round, _SampleRound):
            self._round = self._round.first.between(window_of(counts, self._below / self._total))
            return
        if self._first() and counts[INFINITY_DIGIT + 1 :].any():
            raise ValueError("a score is NaN: the weights or the adapter hold NaN or infinity")
        through = counts.cumsum(0)
        if int(through[-1]) != self._expected:
            raise RuntimeError(f"{int(through[-1])} entries were counted, expected {self._expected}")
        bin = int(torch.searchsorted(through, self._below, right=True))
        if isinstance(self._round, _KeyRound) and self._round.blurs(bin):
            self._round = self._round.between(None)
            return
        self._expected = int(counts[bin])
        self._below -= int(through[bin]) - self._expected
        self._round = self._round.inside(bin)
        if self._below == 0:
            self._finish(*self._round.first())

    def _first(self) -> bool:
        """Whether this round counts the highest digit of all entries."""
        return isinstance(self._round, _KeyRound) and self._round.shift == self._key_bits - 16

    def _finish(self, key: int, position: int) -> None:
        self.cut = Cut(key, position, self._key_bits)


@dataclass(frozen=True)
class _KeyRound:
    """Looks at the 16 bits at `shift` of the keys that begin with `prefix`."""

    shift: int
    prefix: int
    total: int
    window: Window | None = None

    def wants(self, position: int, numel: int) -> bool:
        return numel > 0

    def count(self, loops: Loops, ranked: Tensor, position: int, histogram: Tensor) -> None:
        loops.count_digits(ranked, self.shift, self.prefix, histogram, self.window)

    def between(self, window: Window | None) -> _KeyRound:
        """The same round, with another window."""
        return replace(self, window=window)

    def blurs(self, bin: int) -> bool:
        """Whether other digits may have been counted as this one."""
        if self.window is None:
            return False
        low, high = self.window
        return 0 < low >= bin or INFINITY_DIGIT > high <= bin

    def inside(self, bin: int) -> _KeyRound | _TieRound:
        prefix = self.prefix << 16 | bin
        if self.shift:
            return _KeyRound(self.shift - 16, prefix, self.total)
        return _TieRound(prefix, 0, self.total)

    def first(self) -> tuple[int, int]:
        """Lowest (key, position) that this round looks at."""
        return self.prefix << (self.shift + 16), 0


@dataclass(frozen=True)
class _SampleRound:
    """Looks at some of what the first round looks at."""

    first: _KeyRound

    def wants(self, position: int, numel: int) -> bool:
        return numel > 0

    def count(self, loops: Loops, ranked: Tensor, position: int, histogram: Tensor) -> None:
        whole = ranked.numel() // STEP * STEP
        part = ranked[:whole].view(-1, STEP)[:, :STRETCH].reshape(-1) if whole else ranked[:STRETCH]
        self.first.count(loops, part, position, histogram)


def window_of(sample: Tensor, share: float) -> Window | None:
    """Digits between which the entry at `share` of all lies, by a sample's (65536,) counts; None if it's empty."""
    through = sample.cumsum(0)
    shares = torch.tensor([share - MARGIN, share + MARGIN], dtype=torch.float64)
    low, high = torch.searchsorted(through.double(), shares * through[-1]).tolist()
    low, high = max(0, min(low - 1, INFINITY_DIGIT - 1)), min(high + 1, INFINITY_DIGIT)
    return (low, high) if through[-1] and low < high else None


@dataclass(frozen=True)
class _TieRound:
    """Looks at positions start to stop of the entries whose key is `key`."""

    key: int
    start: int
    stop: int

    @property
    def shift(self) -> int:
        """log2 of the positions that share a bin."""
        return max(0, (self.stop - self.start - 1).bit_length() - 16)

    def wants(self, position: int, numel: int) -> bool:
        return position < self.stop and position + numel > self.start and numel > 0

    def count(self, loops: Loops, ranked: Tensor, position: int, histogram: Tensor) -> None:
        first, last = max(self.start, position), min(self.stop, position + ranked.numel())
        if first < last:
            part = ranked[first - position : last - position]
            loops.count_ties(part, self.key, first - self.start, self.shift, histogram)

    def inside(self, bin: int) -> _TieRound:
        start = self.start + (bin << self.shift)
        return _TieRound(self.key, start, min(self.stop, start + (1 << self.shift)))

    def first(self) -> tuple[int, int]:
        return self.key, self.start


def global_cut(
    blocks: Blocks,
    num_remove: int,
    total: int,
    key_bits: int,
    reduce: Callable[[Tensor], Tensor] = lambda histogram: histogram,
    *,
    device: torch.device | str = "cpu",
    use_compiled: bool | None = None,
    sampled: bool = False,
) -> Cut:
    """Run a whole search. Collective if `reduce` is.

    Args:
        blocks: called once a round with `CutSearch.wants`; gives (ranked, position) of what lies here.
        num_remove: entries to remove, 0 to total.
        total: entries of the pool over all ranks.
        key_bits: 16 or 32.
        reduce: sums a (65536,) int64 tensor over the ranks; the default is for one process.
        device: where the tensor that is reduced shall lie.
        use_compiled: see CutSearch.
        sampled: see CutSearch.

    Returns:
        The cut, the same on every rank.
    """
    search = CutSearch(num_remove, total, key_bits, device=device, use_compiled=use_compiled, sampled=sampled)
    while search.cut is None:
        for ranked, position in blocks(search.wants):
            search.count(ranked, position)
        search.advance(reduce(search.histogram))
    return search.cut


def apply_cut_(
    weight: Tensor, ranked: Tensor, position: int, cut: Cut, *, use_compiled: bool | None = None
) -> int | Tensor:
    """Zero, in place, the entries of one block that a cut removes.

    Args:
        weight: (n,) contiguous stored entries.
        ranked: (n,) their keys, or `weight` itself where it was ranked by magnitude.
        position: place in the pool of `weight[0]`.
        cut: from a search over the pool.
        use_compiled: see CutSearch.

    Returns:
        Entries removed, those that were zero before included; over all blocks of a pool that is exactly
        `num_remove`. On an accelerator a tensor of no dimension: add them up before reading one.
    """
    assert weight.is_contiguous() and weight.shape == ranked.shape, (weight.shape, ranked.shape)
    loops = choose_loops(weight.numel(), weight.device, use_compiled)
    removed: int | Tensor = 0
    for offset, part in in_key_width(ranked, cut.key_bits):
        entries = weight[offset : offset + part.numel()]
        # Of the entries that tie at the cut's key, those at an earlier position go.
        split = min(max(cut.position - position - offset, 0), part.numel())
        if split:
            removed = removed + loops.zero_up_to_(entries[:split], part[:split], cut.key)
        if split < part.numel() and cut.key > 0:
            removed = removed + loops.zero_up_to_(entries[split:], part[split:], cut.key - 1)
    return removed
