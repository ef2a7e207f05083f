"""Which entries of a weight are not zero, told from their bits: several times as fast on the CPU as by value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers as wide as a float, by bytes."""

CPU_CHUNK = 2**17
"""Entries handled at once on the CPU: what leaves a core's cache costs several times as much."""


def nonzero(tensor: Tensor) -> Tensor:
    """tensor != 0, as a bool in its shape: False for -0.0, True for NaN and the smallest subnormals."""
    if not tensor.is_floating_point() or tensor.element_size() not in INTEGERS or not tensor.is_contiguous():
        return tensor != 0
    return (tensor.detach().view(INTEGERS[tensor.element_size()]) << 1).bool()


def count_nonzero(tensor: Tensor) -> int:
    """How many entries are not zero."""
    if tensor.device.type != "cpu":
        return int(torch.count_nonzero(tensor))
    if tensor.dtype is torch.bool:
        return int(np.count_nonzero(tensor.numpy()))
    parts = tensor.detach().reshape(-1).split(CPU_CHUNK)
    return sum(int(np.count_nonzero(nonzero(part).numpy())) for part in parts)
