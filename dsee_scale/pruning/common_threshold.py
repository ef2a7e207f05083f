"""How many entries each of several matrices loses under one threshold for all, from histograms of their keys."""

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
    """Add keys (see `score.keys`) to a matrix's (NUM_BINS,) int64 histogram; those of zeros alone to bin 0."""
    bins = torch.maximum(keys >> KEY_SHIFT, keys.clamp_max(1))
    histogram_B += torch.bincount(bins.flatten(), minlength=NUM_BINS).to(histogram_B.device)


def deal_removals(histograms_MB: Tensor, num_remove: int) -> list[int]:
    """Entries that each matrix loses, by one threshold for all but no farther from the common share than SWAY.

    Where the zeros of some matrices leave no room for the least share of the others, there is no least share.

    Args:
        histograms_MB: (M, NUM_BINS) int64; bin 0 holds the entries that are zero already, which always go.
        num_remove: how many go in all, at most the number of entries.

    Returns:
        M numbers that sum to `num_remove`; where at least as many entries are zero already, exactly those.
    """
    counts = histograms_MB.cpu().numpy()
    numel = counts.sum(1)
    share = num_remove / max(1, numel.sum())
    least = np.maximum(np.floor((1 - SWAY) * share * numel), counts[:, 0])
    if least.sum() > num_remove:
        least = counts[:, 0]
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
