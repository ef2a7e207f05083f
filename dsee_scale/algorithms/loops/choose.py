"""The fastest loops for a device: compiled ones on the CPU where they pay, Triton's on a GPU, else torch's."""

from __future__ import annotations

import functools

import torch

from dsee_scale.algorithms import bits
from dsee_scale.algorithms.current_gpu import has_triton
from dsee_scale.algorithms.loops.compiled import load
from dsee_scale.algorithms.loops.protocol import Loops
from dsee_scale.algorithms.loops.torch_loops import TorchLoops


def choose_loops(num_entries: int, device: torch.device, use_compiled: bool | None = None) -> Loops:
    """The loops for entries on `device`.

    Args:
        num_entries: entries that are going to be processed, in all; tells whether compiling pays on the CPU.
        device: where they lie.
        use_compiled: True to insist on compiled ones on the CPU, False on plain ones anywhere. Results are the same.

    Raises:
        RuntimeError: `use_compiled` is True but numba cannot be imported.
    """
    if use_compiled is False:
        return TorchLoops()
    if device.type == "cuda":
        return _triton_loops() or TorchLoops()
    if bits.is_host(device):
        fast = load(1 if use_compiled else num_entries, insist=bool(use_compiled))
        if fast is not None:
            return fast
    return TorchLoops()


@functools.cache
def _triton_loops() -> Loops | None:
    """None where Triton can't be used."""
    if not has_triton():
        return None
    from dsee_scale.algorithms.loops.triton_loops import TritonLoops

    return TritonLoops()
