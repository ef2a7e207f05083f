"""How many entries each of several matrices loses, given one number for all and how the scores are spread.

One threshold over all scores says it, within bounds: no matrix loses much less or more than its share. Scores are
known by histograms alone, a row for each matrix, which ranks can sum; inside a bin they count as evenly spread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KEY_SHIFT = 19
"""Bits of a float32 key that a bin leaves out: 16 bins for each power of two."""
NUM_BINS = 1 << (31 - KEY_SHIFT)
SWAY = 0.6
"""How far a matrix may be from the common sparsity: this part of the way to none, or to all."""


def count_keys_(histogram_B: Tensor, keys: Tensor) -> None:
    """Add the keys of some entries (see `score.keys`) to a matrix's (NUM_BINS,) int64 histogram."""
    histogram_B += torch.bincount(keys.flatten() >> KEY_SHIFT, minlength=NUM_BINS).to(histogram_B.device)


def deal_removals(histograms_MB: Tensor, num_remove: int) -> list[int]:
    """Entries that each matrix loses.

    Args:
        histograms_MB: (M, NUM_BINS) int64; bin 0 holds the entries that are zero already, which always go.
        num_remove: how many go in all, at most the number of entries.

    Returns:
        M numbers that sum to `num_remove`, unless more entries are zero already.
    """
    counts = histograms_MB.cpu().numpy()
    numel = counts.sum(1)
    share = num_remove / max(1, numel.sum())
    least = np.maximum(np.floor((1 - SWAY) * share * numel), counts[:, 0])
    most = np.maximum(np.ceil((1 - (1 - SWAY) * (1 - share)) * numel), least)
    below = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(1)], axis=1)

    def at(threshold: float) -> np.ndarray:
        whole = min(int(threshold), counts.shape[1] - 1)
        inside = below[:, whole] + (threshold - whole) * counts[:, whole]
        return np.clip(inside, least, most)

    low, high = 0.0, float(counts.shape[1])
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() < num_remove else (low, middle)
    wanted = at(high)
    dealt = np.floor(wanted).astype(np.int64)
    left = num_remove - int(dealt.sum())
    room = np.flatnonzero(dealt < numel)
    # The largest fractions first, then in the matrices' order.
    for index in room[np.argsort(-(wanted - dealt)[room], kind="stable")][: max(0, left)]:
        dealt[index] += 1
    return dealt.tolist()
