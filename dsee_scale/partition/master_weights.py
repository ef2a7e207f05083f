"""Float32 master weights for parameters trained in half precision without DeepSpeed, whose optimizers keep their own.

Without them most of a late step is rounded away: bfloat16 has 8 bits, so a norm's weight near 1 moves by 1/256 or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.errors import ConfigError

HALF = (torch.bfloat16, torch.float16)
_CLASSES: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {}


class MasterWeights(torch.optim.Optimizer):
    """Mixin in front of an optimizer's class: updates float32 copies, then rounds them into the parameters.

    Attributes:
        masters: the copies, by parameter; they stand in `param_groups` in the parameters' place.
    """

    masters: dict[nn.Parameter, Tensor]

    @torch.no_grad()
    def take_over(self) -> None:
        """Entries that others have set since the last step (a re-fit, `load_adapter`) become the masters'. Local."""
        for param, master in self.masters.items():
            # Where the model has been moved since, as Accelerate's `prepare` does.
            if master.device != param.device:
                master.data = master.data.to(param.device)
            master.copy_(torch.where(param == master.to(param.dtype), master, param.float()))

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the masters into the parameters. Local."""
        for param, master in self.masters.items():
            param.copy_(master)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the masters, and through them of the parameters."""
        self._opt_called, loss = True, None  # what a learning-rate scheduler asks for
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_over()
        for param, master in self.masters.items():
            master.grad = None if param.grad is None else param.grad.float()
        super().step()
        for master in self.masters.values():
            master.grad = None
        self.give_back()
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the parameters' gradients; the masters have some within a step only."""
        super().zero_grad(set_to_none)
        for param in self.masters:
            param.grad = None


def keep_masters(optimizer: torch.optim.Optimizer, *, scaled: bool = False) -> None:
    """Let an optimizer keep float32 master weights of what it trains in half precision, in place. Local.

        optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-4)
        dsee_scale.keep_masters(optimizer)

    Not for DeepSpeed's: these do so themselves. Nothing is done where all is in float32.

    Args:
        optimizer: of any class, or Accelerate's wrapper of it, before its first step.
        scaled: whether a `GradScaler` works on its gradients, as with the Trainer's `fp16`.

    Raises:
        ConfigError: it is no optimizer, or has made a step already, or someone has replaced its `step`; or the
            gradients would be scaled, which must be in float32.
    """
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"keep_masters got a {type(optimizer).__name__}; expected an optimizer")
    while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, or one of DeepSpeed's
        if any(cls.__name__ == "DeepSpeedOptimizer" for cls in type(optimizer).__mro__):
            return
        optimizer = optimizer.optimizer
    halves = [p for group in optimizer.param_groups for p in group["params"] if p.dtype in HALF]
    if not halves or isinstance(optimizer, MasterWeights):
        return
    if scaled:
        raise ConfigError(
            f"fp16 without DeepSpeed scales gradients, which must be in float32, and what is trained is in "
            f"{halves[0].dtype}; load the model in float32 (autocast computes in float16 all the same), or train with "
            "bf16, or with a DeepSpeed config"
        )
    if optimizer.state:
        raise ConfigError(
            f"{type(optimizer).__name__} has made a step with parameters in {halves[0].dtype}; call keep_masters before"
        )
    # A scheduler has bound the class's `step` to the optimizer, where it would hide ours, which tells it as much.
    if not hasattr(vars(optimizer).get("step", MasterWeights.step), "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"{type(optimizer).__name__}.step was replaced by {vars(optimizer)['step']!r:.200}, which would not move "
            "the master weights; call keep_masters before"
        )
    vars(optimizer).pop("step", None)
    masters = {param: nn.Parameter(param.detach().float()) for param in halves}
    for group in optimizer.param_groups:
        group["params"] = [masters.get(param, param) for param in group["params"]]
    cls = type(optimizer)
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (MasterWeights, cls), {"__module__": cls.__module__})
    optimizer.__class__ = _CLASSES[cls]
    optimizer.masters = masters  # type: ignore[attr-defined]
