"""Moments that bitsandbytes' optimizers keep in 8 bits: a code for each entry, a scale for each 256 entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsee_scale.errors import ConfigError

BLOCK = 256
MOMENTS = {"state1", "state2"}
"""Their names in every optimizer of bitsandbytes, of 8 or 32 bits."""


def is_eight_bit(state: dict[str, Any], key: str) -> bool:
    """Whether a moment is kept in 8 bits; small tensors are not, whatever the optimizer's name says."""
    value = state.get(key)
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and f"absmax{key[-1]}" in state


def read_moment(state: dict[str, Any], key: str, start: int, length: int) -> Tensor | None:
    """Entries start : start + length, flat; a decoded float32 copy of a moment in 8 bits, else a view. Local."""
    if state.get(key) is None:
        return None
    if not is_eight_bit(state, key):
        return state[key].detach().view(-1)[start : start + length]
    first = start // BLOCK * BLOCK
    return _decode(state, key, first, start + length)[start - first :]


def write_moment(state: dict[str, Any], key: str, start: int, values: Tensor) -> None:
    """Set entries of a moment in 8 bits from `start` on. Local.

    They are rounded to 8 bits once more: what was decoded comes back within a step of the code. So are the entries
    that share a block of 256 with them, and no others.
    """
    from bitsandbytes.functional import quantize_blockwise

    n, first = key[-1], start // BLOCK * BLOCK
    stop = min(-(-(start + values.numel()) // BLOCK) * BLOCK, state[key].numel())
    flat = _decode(state, key, first, stop)
    flat[start - first : start - first + values.numel()] = values.to(flat.device)
    codes, how = quantize_blockwise(flat, code=state[f"qmap{n}"], blocksize=BLOCK)
    codes[flat == 0] = int(state[f"qmap{n}"].abs().argmin())  # bitsandbytes 0.50 takes a neighbour on the CPU
    state[key].view(-1)[first:stop].copy_(codes)
    state[f"absmax{n}"][_blocks(first, stop)].copy_(how.absmax)


def _decode(state: dict[str, Any], key: str, first: int, stop: int) -> Tensor:
    """Entries first:stop as float32; `first` begins a block."""
    from bitsandbytes.functional import dequantize_blockwise

    n = key[-1]
    scales = state[f"absmax{n}"][_blocks(first, stop)]
    # A paged optimizer's codes are in memory that the GPU and the host share, which PyTorch takes for the host's.
    codes = state[key].detach().contiguous().view(-1)[first:stop].to(scales.device)
    return dequantize_blockwise(codes, absmax=scales, code=state[f"qmap{n}"], blocksize=BLOCK)


def _blocks(first: int, stop: int) -> slice:
    return slice(first // BLOCK, -(-stop // BLOCK))


def is_bitsandbytes(optimizer: Any) -> bool:
    """Whether an optimizer is one of bitsandbytes', of 8 or 32 bits (told by its class's name)."""
    return any(cls.__name__ == "Optimizer8bit" for cls in type(optimizer).__mro__)


def kept_moments(optimizer: Any) -> list[str]:
    """Names of the moments that a bitsandbytes optimizer keeps now. Local.

    Raises:
        ConfigError: one is of another shape than what it trains, as AdEMAMix has it.
    """
    found: dict[str, None] = {}
    for tensor, state in optimizer.state.items():
        for key in [key for key in sorted(MOMENTS) if state.get(key) is not None]:
            if state[key].shape != tensor.shape:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(state[key].shape)} for {tensor.numel()} "
                    f"trained values, expected one of shape {tuple(tensor.shape)}: no training state can hold it; use "
                    "another optimizer, e.g. AdamW8bit, or save the adapter alone"
                )
            found[key] = None
    return list(found)


def make_state(optimizer: Any, tensor: Any, gindex: int) -> None:
    """Let a bitsandbytes optimizer make its state of a tensor that has none yet; others are left alone. Local."""
    if not is_bitsandbytes(optimizer) or optimizer.state[tensor]:
        return
    if not optimizer.initialized:
        optimizer.check_overrides()
    group = optimizer.param_groups[gindex]
    params = group["params"]
    group["params"] = params or [tensor]  # ZeRO-3 names the tensor during a step only
    for pindex, param in enumerate(group["params"]):
        if param is tensor:
            optimizer.init_state(group, param, gindex, pindex)
    group["params"] = params
