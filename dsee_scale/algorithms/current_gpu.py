"""The current GPU, on which Triton starts its kernels, and whether it can."""

from __future__ import annotations

import functools
import importlib.util
import warnings
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


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed and starts a kernel on this machine's GPU; says so once if it can't."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from dsee_scale.algorithms.triton_zeros import fill_zeros_

        probe = torch.zeros(1, dtype=torch.int16, device="cuda")
        fill_zeros_(probe, probe)
    except Exception as error:  # e.g. no C compiler, or a GPU that it doesn't know
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"Triton is installed but starts no kernel here ({type(error).__name__}: {first}); slower operators of "
            "PyTorch are used instead. It needs a C compiler (set CC, or install gcc) and a GPU that it supports",
            stacklevel=2,
        )
        return False
    return True
