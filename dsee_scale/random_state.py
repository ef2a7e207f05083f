"""What a training draws at random: its generators' states as tensors, and orders of rows that need no state."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def random_state() -> dict[str, Tensor]:
    """The states of PyTorch's (CPU and current CUDA device), NumPy's and Python's global generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": _text([str(kind), np.asarray(keys).tolist(), *rest]),
        "python": _text(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], *, shift: int = 0) -> None:
    """Restore what `random_state` gave.

    Args:
        state: of this rank, or of another one where this rank had none.
        shift: 0 to go on exactly; another number seeds apart from it, the same way every time.
    """
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = json.loads(bytes(state["numpy"].numpy()))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = json.loads(bytes(state["python"].numpy()))
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if shift:
        seed = int(torch.randint(2**31, (1,))) + shift
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class SeededSampler(Sampler[int]):
    """Gives rows in an order that seed and epoch alone decide: one that is resumed finds it, on any number of ranks.

    Args:
        sampler: draws from its `generator`.
        seed: of all epochs; each adds its number.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._drawn, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is asked for next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._drawn)

    def __iter__(self) -> Iterator[int]:
        self._drawn.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._drawn)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a data loader and all samplers in it; accelerate (1.15) doesn't reach those of a shard of which some
    batches are skipped."""
    part = loader
    while part is not None:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        inner = getattr(part, "batch_sampler", None)
        part = getattr(part, "sampler", None) if inner is None else inner


def _text(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
