"""Moments that bitsandbytes' optimizers keep in 8 bits: a code for each entry, a scale for each 256 entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256


def is_eight_bit(state: dict[str, Any], key: str) -> bool:
    """Whether a moment is kept in 8 bits; small tensors are not, whatever the optimizer's name says."""
    value = state.get(key)
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and f"absmax{key[-1]}" in state


def read_moment(state: dict[str, Any], key: str) -> Tensor | None:
    """A moment's values: a decoded float32 copy of one in 8 bits, else the tensor itself. Local."""
    if not is_eight_bit(state, key):
        return state.get(key)
    from bitsandbytes.functional import dequantize_blockwise

    n = key[-1]
    codes = state[key].detach().contiguous().view(-1)
    values = dequantize_blockwise(codes, absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=BLOCK)
    return values.view(state[key].shape)


def write_moment(state: dict[str, Any], key: str, values: Tensor) -> None:
    """Keep new values of a moment in 8 bits. Local.

    They are rounded to 8 bits once more: what was decoded comes back within a step of the code.
    """
    from bitsandbytes.functional import quantize_blockwise

    n, flat = key[-1], values.contiguous().view(-1)
    codes, how = quantize_blockwise(flat, code=state[f"qmap{n}"], blocksize=BLOCK)
    codes[flat == 0] = int(state[f"qmap{n}"].abs().argmin())  # bitsandbytes 0.50 takes a neighbour on the CPU
    state[key].view(-1).copy_(codes)
    state[f"absmax{n}"].copy_(how.absmax)


def make_state(optimizer: Any, tensor: Any) -> None:
    """Let a bitsandbytes optimizer make its state of a tensor that has made no step yet; others are left alone."""
    if not hasattr(optimizer, "init_state") or optimizer.state[tensor]:
        return
    if not optimizer.initialized:
        optimizer.check_overrides()
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, param in enumerate(group["params"]):
            if param is tensor:
                optimizer.init_state(group, param, gindex, pindex)
