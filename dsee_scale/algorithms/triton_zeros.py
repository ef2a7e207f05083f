"""Zeros of one tensor put into another in Triton, for a GPU: each entry is read once and written once.

Runs on CPU tensors through Triton's interpreter (TRITON_INTERPRET=1, set before the first import).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Entries per program."""


def fill_zeros_(target: Tensor, weight: Tensor) -> None:
    """Set `target` to +0 where `weight` is zero of either sign; what else it holds stays bit for bit.

    Args:
        target: (n,) contiguous bits, as integers.
        weight: (n,) contiguous bits of floats, as integers of any width.
    """
    size = target.numel()
    if size:
        # Not `on_its_gpu`: whoever asks there whether Triton works starts this kernel.
        with torch.cuda.device(target.get_device()):
            _fill_zeros[(triton.cdiv(size, BLOCK),)](target, weight, size, BLOCK=BLOCK)


@triton.jit
def _fill_zeros(target, weight, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < size
    without_sign = tl.load(weight + offsets, mask=here, other=0) << 1
    old = tl.load(target + offsets, mask=here, other=0)
    tl.store(target + offsets, tl.where(without_sign == 0, 0, old), mask=here)
