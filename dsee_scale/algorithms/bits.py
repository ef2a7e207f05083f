"""Which entries of a weight are not zero, told from their bits: several times as fast on the CPU as by value."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dsee_scale.algorithms.current_gpu import has_triton

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers as wide as a float, by bytes."""

CHECKSUM_CHUNK = 2**22
"""Entries whose checksum is taken at once on an accelerator: 32 MiB of int64."""

CPU_CHUNK = 2**17
"""Entries handled at once on the CPU: what leaves a core's cache costs several times as much."""
DEVICE_CHUNK = 2**22
"""The same on an accelerator, where it bounds what is held besides."""


def is_host(device: torch.device) -> bool:
    """Whether results are there as soon as an operator returns, and small blocks pay because of the caches."""
    return device.type == "cpu"


def nonzero(tensor: Tensor) -> Tensor:
    """tensor != 0, as a bool in its shape: False for -0.0, True for NaN and the smallest subnormals."""
    if not tensor.is_floating_point() or tensor.element_size() not in INTEGERS or not tensor.is_contiguous():
        return tensor != 0
    return (tensor.detach().view(INTEGERS[tensor.element_size()]) << 1).bool()


def position_sum(values: Tensor, start: int) -> int:
    """Sum of each entry's bits times an odd number that its position gives, in wrapping int64.

    Sums over the stretches of a tensor add up (modulo 2**64) to the same number however it is cut: a checksum of
    content that no process holds together.

    Args:
        values: (n,) a stretch in flat order.
        start: position of its first entry.
    """
    words = values.detach().contiguous().view(INTEGERS[values.element_size()])
    chunk = CPU_CHUNK if words.device.type == "cpu" else CHECKSUM_CHUNK
    steps = torch.arange(0, 2 * min(chunk, words.numel()), 2, device=words.device)
    total, first = 0, 2 * start + 1
    for part in words.split(chunk):
        bits = part.long()
        total += int(bits.sum()) * first + int(bits.mul(steps[: bits.numel()]).sum())
        first += 2 * bits.numel()
    return (total + 2**63) % 2**64 - 2**63


def count_nonzero(tensor: Tensor) -> int:
    """How many entries are not zero."""
    if tensor.device.type != "cpu":
        return int(torch.count_nonzero(tensor))
    if tensor.dtype is torch.bool:
        return int(np.count_nonzero(tensor.numpy()))
    parts = tensor.detach().reshape(-1).split(CPU_CHUNK)
    return sum(int(np.count_nonzero(nonzero(part).numpy())) for part in parts)


def count_ones(packed: np.ndarray) -> int:
    """How many bits of bytes are 1."""
    if not hasattr(np, "bitwise_count"):  # before NumPy 2
        return int(np.count_nonzero(np.unpackbits(packed)))
    whole = packed.size // 8 * 8
    words = np.bitwise_count(packed[:whole].view(np.uint64)).sum(dtype=np.int64)
    return int(words + np.bitwise_count(packed[whole:]).sum(dtype=np.int64))


def multiply_by_bits_(words: Tensor, bits: Tensor) -> None:
    """words *= bits, in place.

    Args:
        words: (n,) integers.
        bits: (n,) bool.
    """
    if words.device.type != "cpu":
        words.mul_(bits)
        return
    # NumPy widens small blocks that stay in the cache, torch the whole.
    np.multiply(words.numpy(), bits.numpy().view(np.uint8), out=words.numpy())


def zero_where_zero_(target: Tensor, weight: Tensor) -> Tensor:
    """target *= (weight != 0), in place, also where the target is no number; the zeros are +0.0.

    Args:
        target: any floating dtype.
        weight: of the same shape.
    """
    width = weight.element_size()
    by_bits = target.device.type == "cpu" and target.element_size() == width and width in INTEGERS
    if torch.compiler.is_compiling():
        return target.masked_fill_(weight == 0, 0)
    if _in_one_pass(target, weight):
        from dsee_scale.algorithms.triton_zeros import fill_zeros_

        fill_zeros_(*(each.detach().view(INTEGERS[each.element_size()]) for each in (target, weight)))
        torch.autograd.graph.increment_version(target)
        return target
    # In blocks: on the CPU they stay in a core's cache, on an accelerator they bound the mask's memory.
    rows = max(1, (CPU_CHUNK if by_bits else DEVICE_CHUNK) // max(1, math.prod(target.shape[1:])))
    for part, weights in zip(target.split(rows), weight.detach().split(rows), strict=True):
        if not by_bits:
            part.masked_fill_(weights == 0, 0)
            continue
        # By integers: comparing and filling takes thirty times as long as the products of bits.
        bits = weights.view(INTEGERS[width])
        part.view(bits.dtype).mul_(bits.bitwise_and(torch.iinfo(bits.dtype).max).clamp_max_(1))
    return target


def _in_one_pass(target: Tensor, weight: Tensor) -> bool:
    """Whether a kernel of our own reads both: on one GPU with Triton, where no gradient has to know of it."""
    return (
        target.device.type == "cuda"
        and target.device == weight.device
        and all(each.is_contiguous() and each.element_size() in INTEGERS for each in (target, weight))
        and weight.is_floating_point()
        and not target.requires_grad
        and has_triton()
    )
