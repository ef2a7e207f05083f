"""What an optimizer keeps about the trained parameters, told apart from how DeepSpeed stores it.

Every engine keeps float32 master values and moments in flat tensors, of which a rank holds some stretches
of some parameters. A `Stretch` says where. ZeRO-3 cuts each parameter evenly, ZeRO-1, ZeRO-2 and the bf16
optimizer cut one long flat tensor per group, a plain optimizer keeps whole parameters.

DeepSpeed's own setters (`safe_set_full_fp32_param` and the like, 0.19.8) fail on sizes that do not divide by
the number of ranks, and know no optimizer state before the first step; hence the work on its flat tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsee_scale.errors import FormatError
from dsee_scale.partition.eight_bit_moments import (
    MOMENTS,
    is_bitsandbytes,
    is_eight_bit,
    kept_moments,
    make_state,
    read_moment,
    write_moment,
)

MASTER = "master"
"""Key of a parameter's own values in the optimizer's precision, beside `exp_avg` and so on."""
HOW = {"fused", "foreach", "capturable", "differentiable"}
"""Settings of PyTorch's optimizers that say how to compute on this machine; each run keeps its own."""


@dataclass(frozen=True)
class Stretch:
    """Entries start : start + length of a parameter, kept at offset in the optimizer's tensor `flat`."""

    start: int
    length: int
    flat: Any
    offset: int
    optimizer: Any
    group: int

    def view(self, tensor: Tensor) -> Tensor:
        """The stretch in `flat` or in a moment of the same shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of `flat`; empty before the first step."""
        return self.optimizer.state[self.flat]

    def read(self, key: str) -> Tensor | None:
        """Values under `MASTER` or a moment's name, flat: a view, or a decoded copy of a moment in 8 bits."""
        if key == MASTER:
            return self.view(self.flat)
        return read_moment(self.state, key, self.offset, self.length)

    def write(self, key: str, values: Tensor) -> None:
        """Set the values under `MASTER` or a moment's name."""
        if key != MASTER and is_eight_bit(self.state, key):
            write_moment(self.state, key, self.offset, values.to(self.state[key].device))
        else:
            self.view(self.flat if key == MASTER else self.state[key]).copy_(values)


class OptimizerState:
    """Master values and moments of trained parameters, by parameter name.

    Args:
        stretches, sizes, sharded: see the attributes.
        keepers: the torch optimizers; the first one's groups hold the settings.
        group: process group over which ranks hold different stretches.
        device: where that group's tensors must lie.

    Attributes:
        stretches: what this rank holds, by parameter name; a name may be missing here.
        sizes: true number of entries of every trained parameter.
        sharded: whether ranks hold different stretches.
    """

    def __init__(
        self,
        stretches: Mapping[str, Stretch],
        sizes: Mapping[str, int],
        keepers: Sequence[Any],
        *,
        group: Any = None,
        sharded: bool = False,
        device: torch.device,
    ) -> None:
        self.stretches, self.sizes, self._keepers = dict(stretches), dict(sizes), keepers
        self._process_group, self.sharded, self._device = group, sharded, device

    def moments(self) -> list[str]:
        """Names of the moments, `exp_avg` and so on; empty before the first step.

        Raises:
            ConfigError: an optimizer of bitsandbytes keeps one of another shape than what it trains.
        """
        return list(dict.fromkeys(key for keeper in self._keepers for key in _moments(keeper)))

    def expect_moments(self, saved: Sequence[str], where: Path) -> None:
        """Refuse another optimizer's moments where one is bitsandbytes'. Local. Others tell theirs at a step only.

        Raises:
            FormatError: naming both.
            ConfigError: as `moments`.
        """
        for stretch in self.stretches.values():
            make_state(stretch.optimizer, stretch.flat, stretch.group)
        for keeper in self._keepers:
            if is_bitsandbytes(keeper):
                kept = kept_moments(keeper)
                differ = bool(kept) and set(kept) != set(saved)
            else:
                kept, differ = ["others"], bool(saved) and set(saved) <= MOMENTS
            if differ:
                raise FormatError(
                    f"{where}: the moments are {', '.join(saved)}, {type(keeper).__name__} has {', '.join(kept)}; "
                    "resume with the optimizer of the saved run, or call load_adapter alone to begin anew with this one"
                )

    def gather(self, items: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Collective. Whole values, float32 and flat, of (parameter, key) pairs, in one transfer.

        Extra memory: their sizes. Bits are kept, since each entry is one rank's alone.
        """
        sizes = [self.sizes[name] for name, _ in items]
        whole = torch.zeros(sum(sizes), dtype=torch.float32)
        for (name, key), target in zip(items, whole.split(sizes), strict=True):
            stretch = self.stretches.get(name)
            source = None if stretch is None else stretch.read(key)
            if stretch is not None and source is not None:
                target[stretch.start : stretch.start + stretch.length] = source.float().cpu()
        return list(self._sum(whole).split(sizes))

    def steps(self) -> dict[str, int]:
        """Collective. Number of updates that each parameter has had."""
        mine = torch.zeros(len(self.sizes), dtype=torch.float32)
        for i, name in enumerate(self.sizes):
            stretch = self.stretches.get(name)
            if stretch is not None and stretch.start == 0 and "step" in stretch.state:
                mine[i] = float(stretch.state["step"])
        return {name: int(n) for name, n in zip(self.sizes, self._sum(mine).tolist(), strict=True)}

    def put(self, name: str, key: str, values: Tensor) -> None:
        """Set this rank's stretch of a parameter's master values or of one moment, after `put_steps`. Local.

        Args:
            name: a parameter of `stretches`.
            key: `MASTER` or a moment, which is made if the optimizer has not.
            values: (length of the stretch,).
        """
        stretch = self.stretches[name]
        if key != MASTER and key not in stretch.state:
            stretch.state[key] = torch.zeros_like(
                stretch.flat, dtype=_moment_dtype(stretch), requires_grad=False
            )
        with torch.no_grad():
            stretch.write(key, values)

    def put_steps(self, steps: Mapping[str, int]) -> None:
        """Set the number of updates, as the optimizer in use keeps it. Local. Zero clears a state."""
        stepped = {name: stretch for name, stretch in self.stretches.items() if steps.get(name, 0)}
        for name in self.stretches.keys() - stepped.keys():
            self.stretches[name].state.clear()
        for name, stretch in stepped.items():  # later: the state may be that of a cleared one's tensor too
            make_state(stretch.optimizer, stretch.flat, stretch.group)
            stretch.state["step"] = _step_value(stretch, steps[name])

    def groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer's groups (lr, betas, ...) that are plain values, but for how it computes."""
        return [
            {key: value for key, value in group.items() if _is_plain(value) and key not in HOW}
            for group in self._groups()
        ]

    def put_groups(self, saved: Sequence[Mapping[str, Any]]) -> bool:
        """Set the groups' settings; False, and nothing done, where their number differs. Local."""
        if len(saved) != len(self._groups()):
            return False
        for group, values in zip(self._groups(), saved, strict=True):
            for key, value in values.items():
                if key in group and key not in HOW:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value
        return True

    @property
    def waiting(self) -> bool:
        """Whether gradients wait for the next step."""
        return False

    def refresh(self) -> None:
        """Collective. After `put`: carry master values over into the parameters that compute."""

    def _groups(self) -> list[dict[str, Any]]:
        return self._keepers[0].param_groups

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum of what is zero on all ranks but one, as integers: every bit survives, -0.0 and NaN too."""
        if self.sharded:
            there = tensor.to(self._device)
            dist.all_reduce(there.view(torch.int32), group=self._process_group)
            tensor = there.cpu()
        return tensor


def _moments(keeper: Any) -> list[str]:
    """Names of one optimizer's moments."""
    if is_bitsandbytes(keeper):
        return kept_moments(keeper)
    return [
        key
        for flat, state in keeper.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == flat.shape
    ]


def _moment_dtype(stretch: Stretch) -> torch.dtype:
    """The dtype in which the optimizer itself would make a moment."""
    if getattr(stretch.optimizer, "fp32_optimizer_states", False) or is_bitsandbytes(stretch.optimizer):
        return torch.float32
    return stretch.flat.dtype


def _step_value(stretch: Stretch, step: int) -> Any:
    """PyTorch's optimizers count in a tensor, on the device if fused or capturable; DeepSpeed's in an int."""
    if not type(stretch.optimizer).__module__.startswith("torch.optim"):
        return step
    group = stretch.optimizer.param_groups[stretch.group]
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(float(step), dtype=torch.float32, device=stretch.flat.device if on_device else "cpu")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (int, float)) for v in value)
    return value is None or isinstance(value, (int, float, bool, str))
