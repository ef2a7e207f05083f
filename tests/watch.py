"""What a piece of work allocates, sends and waits for, seen where PyTorch dispatches its operators."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "bincount",
    "masked_select",
    "_unique2",
)
"""Operators for which the host waits on a GPU: their result, or its size, is needed at once."""


class Watch(TorchDispatchMode):
    """Records what happens inside the block.

    Args:
        memory: also follow every tensor that is made, which takes most of the time.

    Attributes:
        peak: most bytes that were alive at once, of what was made inside.
        sent: (collective, bytes of all its tensors), in order; DeepSpeed's own ones too.
        syncs: the operators at which the host would wait for a GPU.
        operators: how many there were of all kinds.
    """

    def __init__(self, *, memory: bool = True) -> None:
        super().__init__()
        self._memory = memory
        self.peak = self._alive = 0
        self.sent: list[tuple[str, int]] = []
        self.syncs: list[str] = []
        self.operators = 0
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.sent.append((name.strip("_"), sum(t.numel() * t.element_size() for t in tensors)))
        elif name in HOST_SYNCS or (name.startswith("index") and _by_mask(args)):
            self.syncs.append(name)
        if not self._memory:
            return result
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_real(leaf)}
        for leaf in tree_leaves(result):
            if _is_real(leaf):
                self._hold(leaf, given)
        return result

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        at, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if at not in self._holders:
            if at in given or not size:  # of before the block
                return
            self._holders[at], self._sizes[at] = 0, size
            self._alive += size
            self.peak = max(self.peak, self._alive)
        self._holders[at] += 1
        weakref.finalize(tensor, self._release, at)

    def _release(self, at: int) -> None:
        self._holders[at] -= 1
        if not self._holders[at]:
            del self._holders[at]
            self._alive -= self._sizes.pop(at)


def _by_mask(args: Any) -> bool:
    """Whether a tensor is indexed by booleans."""
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]))


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type not in ("meta",) and not leaf.is_sparse
