"""How ranks fail together, agree, and speak with one voice; without torch.distributed there is one rank.

"Collective." in a docstring: every rank of the group enters the call, in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from dsee_scale.errors import ConfigError, DSEEError, FormatError, PartitionError

T = TypeVar("T")


def is_active() -> bool:
    """Whether torch.distributed has been initialised."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Any = None) -> int:
    """This process's rank in a group, 0 without torch.distributed."""
    return dist.get_rank(group) if is_active() else 0


def world_size(group: Any = None) -> int:
    """Processes of a group, 1 without torch.distributed."""
    return dist.get_world_size(group) if is_active() else 1


def show_progress(wanted: bool | None) -> bool:
    """Whether long work shows a bar here: on rank 0, if asked for or (None) if a person watches."""
    return rank() == 0 and (sys.stderr.isatty() if wanted is None else wanted)


def communication_device(group: Any, device: torch.device) -> torch.device:
    """Where tensors must lie for a group's backend; `device`, that of the weights, where the backend takes any.

    Raises:
        PartitionError: under NCCL nothing tells which GPU is this process's.
    """
    backend = str(dist.get_backend(group))
    if "nccl" in backend:
        bound = getattr(group or dist.group.WORLD, "bound_device_id", None)
        local = os.environ.get("LOCAL_RANK")
        return own_gpu(
            bound or device,
            current=torch.cuda.current_device(),
            count=torch.cuda.device_count(),
            local_rank=int(local) if local else None,
        )
    return torch.device("cpu") if "gloo" in backend else device


def own_gpu(device: torch.device, *, current: int, count: int, local_rank: int | None) -> torch.device:
    """The GPU that this process communicates from, also before `torch.cuda.set_device` was called. Local.

    Args:
        device: what the process group is bound to, or where the weights lie.
        current: PyTorch's current GPU, 0 where nothing was set.
        count: GPUs that this process sees.
        local_rank: what the launcher says, if it does.

    Raises:
        PartitionError: it could be any of several.
    """
    if device.type == "cuda":
        return device if device.index is not None else torch.device("cuda", current)
    if current or count == 1 or local_rank == 0:
        return torch.device("cuda", current)
    if local_rank is not None and local_rank < count:
        return torch.device("cuda", local_rank)
    raise PartitionError(
        f"the processes communicate by NCCL, the weights are on {device.type}, and which of {count} GPUs is this "
        "process's is not known; call torch.cuda.set_device before, or set LOCAL_RANK"
    )


@contextlib.contextmanager
def raise_on_all_ranks(partition: Any = None, *, what: str = "") -> Iterator[None]:
    """Collective at its end: an error inside, on any rank, is raised on every rank.

    What stands inside must be local: a collective there would leave ranks waiting. One small message if all is well.

    Args:
        partition: the ranks that hold a model together; None is all of them.
        what: what failed, for an error that is none of ours: "reading the data" makes a ConfigError of it.

    Raises:
        DSEEError: of the type and with the text that the lowest failing rank met.
    """
    error: Exception | None = None
    try:
        yield
    except DSEEError as caught:
        error = caught
    except Exception as caught:
        error = caught
        if what:
            error = ConfigError(f"{what} failed: {type(caught).__name__}: {caught}")
        elif isinstance(caught, OSError):
            error = FormatError(f"{caught.filename or 'file'}: {caught.strerror or caught}")
    if partition is None:
        raise_first(error)
    else:
        partition.raise_first(error)


def raise_first(error: Exception | None, *, group: Any = None) -> None:
    """Collective. Raise the lowest failing rank's error on every rank; return if there is none."""
    if world_size(group) == 1:
        if error is not None:
            raise error
        return
    device = communication_device(group, torch.device("cpu"))
    first = torch.tensor([world_size(group) if error is None else rank(group)], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
    source = int(first.item())
    if source == world_size(group):
        return
    errors = gather_objects(None if error is None else _portable(error, rank(group)), group=group)
    raise errors[source] from error  # type: ignore[misc]


def _portable(error: Exception, of_rank: int) -> DSEEError:
    """An error that survives pickling: ours as they are, others as their text."""
    if type(error).__module__ == DSEEError.__module__:
        return type(error)(str(error))  # type: ignore[return-value]
    return PartitionError(f"rank {of_rank}: {type(error).__name__}: {error}")


def gather_objects(value: T, *, group: Any = None) -> list[T]:
    """Collective. Every rank's (small, picklable) value, in the order of the ranks."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    with _own_device(group):
        dist.all_gather_object(values, value, group=group)
    return values


def from_rank0(value: T) -> T:
    """Collective. Rank 0's (small, picklable) value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with _own_device(None):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _own_device(group: Any) -> contextlib.AbstractContextManager[Any]:
    """Objects travel from PyTorch's current GPU, which before `set_device` is the same for all processes."""
    device = communication_device(group, torch.device("cpu"))
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def max_over_ranks(*flags: int, device: torch.device) -> list[int]:
    """Collective. The largest value of each flag over all ranks."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=communication_device(None, device))
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


MEETING = 5.0
"""Seconds after which the ranks meet anew while they wait for one of them."""


def meet_until(ended: Callable[[float], bool] | None, *, device: torch.device) -> None:
    """Collective. Wait for what one rank has begun, however long it takes: in one collective the others would give up.

    Args:
        ended: there, whether it is over, after waiting so many seconds at most; None elsewhere.
        device: see `max_over_ranks`.
    """
    while max_over_ranks(int(ended is not None and not ended(MEETING)), device=device)[0]:
        pass


def log_rank0(logger: logging.Logger, text: str, *values: object, level: int = logging.WARNING) -> None:
    """Log what all ranks see alike, on one of them."""
    if rank() == 0:
        logger.log(level, text, *values)


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code, after its exit handlers, but without tearing the interpreter down.

    Threads of gloo and of data loaders that are still alive then abort a finished process now and then
    ("terminate called without an active exception"), and the launcher counts the run as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
