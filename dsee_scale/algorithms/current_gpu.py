"""The current GPU, on which Triton starts its kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_gpu(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Make the first argument's GPU the current one meanwhile."""

    @functools.wraps(launch)
    def guarded(target: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(target.get_device()):  # -1 of a CPU tensor: nothing is done
            return launch(target, *args, **kwargs)

    return guarded
