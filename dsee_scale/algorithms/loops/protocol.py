"""What a selection does with every entry, whoever does it.

`ranked` is a 1-D contiguous tensor of 16 or 32 bits an entry: integer keys, or a weight whose bits without
the sign are its keys. Both forms are read through a view.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

BINS = 2**16
INFINITY_DIGIT = 0x7F80
"""The 16 high bits of infinity, in float32 as in bfloat16; only NaN lies above."""

Window = tuple[int, int]
"""Digits (low, high), 0 <= low < high <= INFINITY_DIGIT, between which alone digits need be told apart."""


class Loops(Protocol):
    """Tensors of one call lie on one device."""

    def count_digits(
        self, ranked: Tensor, shift: int, prefix: int, histogram: Tensor, window: Window | None = None
    ) -> None:
        """Count the 16 key bits at `shift`, of keys whose bits above those equal `prefix`.

        Args:
            ranked: (n,) entries.
            shift: 0, or 16 for the high half of 32-bit keys.
            prefix: the key's bits above, 0 if there are none.
            histogram: (65536,) int64, added to.
            window: of the highest digit, where that saves time: those below the window may be counted as its low one,
                those above it as its high one, all of NaN as INFINITY_DIGIT + 1.
        """

    def count_ties(self, ranked: Tensor, key: int, offset: int, shift: int, histogram: Tensor) -> None:
        """Add 1 to bin (offset + i) >> shift of `histogram` for each entry i whose key is `key`."""

    def zero_up_to_(self, weight: Tensor, ranked: Tensor, last: int) -> int | Tensor:
        """Zero, in place, the entries of `weight` whose keys are at most `last`.

        Args:
            weight: (n,) contiguous, 16 or 32 bits an entry.
            ranked: (n,) its keys; may be `weight` itself.
            last: largest key that goes, at least 0.

        Returns:
            How many entries that are; on an accelerator a tensor of no dimension, for which nobody has waited.
        """
