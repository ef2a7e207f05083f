"""The states of all random generators that a training uses, as tensors."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor


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


def _text(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
