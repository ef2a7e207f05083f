"""Set lines of parameters to zero, wherever values and optimizer state are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from dsee_scale.algorithms.patterns import zero_along_axis_
from dsee_scale.errors import PartitionError
from dsee_scale.partition import Partition, is_engine, unwrap
from dsee_scale.partition.eight_bit_moments import is_eight_bit
from dsee_scale.partition.engine_state import open_optimizer, owned_by_deepspeed, within_an_engine
from dsee_scale.partition.master_weights import HALF, MasterWeights
from dsee_scale.partition.optimizer_state import Stretch

_HOOKS: list[Any] = []
_WAITING: Any = WeakTensorKeyDictionary()
"""Parameter -> lines of it whose moments a plain optimizer still has to forget."""


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows (axis 0) or columns (axis 1) of a matrix that a parameter is, or holds in its flat order.

    Attributes:
        param: a parameter; one of one dimension counts as one row.
        axis: 0 or 1.
        gone: bool, one for each row or column.
        shape: rows and columns of the matrix.
        offset: where in the whole parameter the matrix begins.
    """

    param: nn.Parameter
    axis: int
    gone: Tensor
    shape: tuple[int, int]
    offset: int = 0

    def clear(self, stretch: Tensor, start: int) -> None:
        """Zero them in a stretch of the parameter's flat order that begins at `start`. Local."""
        first = max(start, self.offset)
        stop = min(start + stretch.numel(), self.offset + self.shape[0] * self.shape[1])
        if first < stop:
            inside, gone = stretch[first - start : stop - start], self.gone.to(stretch.device)
            zero_along_axis_(inside, first - self.offset, self.shape[1], self.axis, gone)


def check_reachable(model: nn.Module, params: Sequence[nn.Parameter]) -> None:
    """Refuse trained parameters whose optimizer state could not be reached or would be moved on. Local.

    Raises:
        PartitionError: DeepSpeed trains them, and `model` is not its engine; or its next step would use
            gradients from before.
    """
    trained = [param for param in params if param.requires_grad]
    # At stage 0 parameters in float32 are what the optimizer moves; of others it keeps masters.
    masters = within_an_engine(unwrap(model)) and any(param.dtype in HALF for param in trained)
    if (masters or any(map(owned_by_deepspeed, trained))) and not is_engine(model):
        raise PartitionError(
            f"a DeepSpeed optimizer holds state of what is removed, and {type(model).__name__} is not its "
            "engine; pass the engine that deepspeed.initialize returned"
        )
    if trained and is_engine(model) and open_optimizer(model).waiting:
        raise PartitionError(
            "earlier gradients are still waiting for the optimizer's next step, which would move what is set "
            "to zero now; call this right after the engine.step() that ends a gradient accumulation (where "
            "engine.is_gradient_accumulation_boundary() was true)"
        )


def zero_lines(model: nn.Module, partition: Partition, lines: Sequence[Lines]) -> None:
    """Zero lines of parameters in every stored copy, and in the master values and moments of an optimizer.

    Local, after `check_reachable`. A moment that is left would move a zeroed parameter on without any gradient.
    A DeepSpeed engine knows its optimizer; the moments of any other torch optimizer are cleared when it makes its
    next step, or is saved before that (`clear_waiting`).

    Args:
        model: what `prune` was given.
        partition: port to its weights.
        lines: what to zero; trained and frozen parameters alike.
    """
    for one in lines:
        with partition.edit(one.param) as stretches:
            for stretch in stretches:
                one.clear(stretch.data, stretch.start)
    trained = [one for one in lines if one.param.requires_grad]
    if not trained:
        return
    if is_engine(model):
        _clear_engine_state(model, trained)
    else:
        _clear_later(trained)


@torch.no_grad()
def _clear_engine_state(model: nn.Module, lines: Sequence[Lines]) -> None:
    names = {id(param): name for name, param in unwrap(model).named_parameters()}
    kept = open_optimizer(model)
    for one in lines:
        stretch = kept.stretches.get(names[id(one.param)])
        if stretch is None:
            continue
        one.clear(stretch.view(stretch.flat), stretch.start)
        _clear_moments(stretch, one)


def _clear_moments(stretch: Stretch, lines: Lines) -> None:
    """Zero the lines in every moment of a stretch, those in 8 bits included."""
    like = stretch.flat.shape
    for key in [k for k, value in stretch.state.items() if isinstance(value, Tensor) and value.shape == like]:
        moment = stretch.read(key)
        assert moment is not None
        lines.clear(moment, stretch.start)
        if is_eight_bit(stretch.state, key):
            stretch.write(key, moment)


def clear_waiting(optimizers: Iterable[Any]) -> None:
    """Clear the moments of the lines that wait, once. Before a torch optimizer's step or checkpoint."""
    for optimizer in optimizers:
        _clear_waiting(optimizer)


@torch.no_grad()
def _clear_waiting(optimizer: Any, *_: Any) -> None:
    trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
    masters = optimizer.masters if isinstance(optimizer, MasterWeights) else {}
    for param in list(_WAITING):
        flat = masters.get(param, param)
        if id(flat) in trained:
            for one in _WAITING.pop(param):
                _clear_moments(Stretch(0, flat.numel(), flat, 0, optimizer, 0), Lines(param, *one))


@torch.no_grad()
def _clear_later(lines: Sequence[Lines]) -> None:
    """Clear gradients now and moments later: no parameter knows its optimizer.

    The hook cannot take itself off: it stays, idle.
    """
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_clear_waiting))
    for one in lines:
        if one.param.grad is not None:
            one.clear(one.param.grad.view(-1), 0)
        _WAITING.setdefault(one.param, []).append((one.axis, one.gone, one.shape, one.offset))
