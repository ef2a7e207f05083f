"""What an optimizer keeps about the trained parameters, told apart from how DeepSpeed stores it.

Every engine keeps float32 master values and moments in flat tensors, of which a rank holds some stretches
of some parameters. A `Stretch` says where. ZeRO-3 cuts each parameter evenly, ZeRO-1, ZeRO-2 and the bf16
optimizer cut one long flat tensor per group, a plain optimizer keeps whole parameters.

DeepSpeed's own setters (`safe_set_full_fp32_param` and the like, 0.19.8) fail on sizes that do not divide by
the number of ranks, and know no optimizer state before the first step; hence the work on its flat tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsee_scale.errors import ConfigError, FormatError
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
PLAIN = {"bool": bool, "int": int, "float": float}
COUNT_IN_THE_LAST = ("FusedAdam", "FusedLion")
"""DeepSpeed's (0.19.8) count steps in the state of a group's last parameter alone."""


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
        stretches, sizes, keepers, sharded: see the attributes.
        group: process group over which ranks hold different stretches.
        device: where that group's tensors must lie.

    Attributes:
        stretches: what this rank holds, by parameter name; a name may be missing here.
        sizes: true number of entries of every trained parameter.
        keepers: the torch optimizers; the first one's groups hold the settings.
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
        self.stretches, self.sizes, self.keepers = dict(stretches), dict(sizes), keepers
        self._process_group, self.sharded, self._device = group, sharded, device

    def moments(self) -> list[str]:
        """Names of the moments, `exp_avg` and so on; empty before the first step.

        Raises:
            ConfigError: an optimizer keeps something that is neither of the shape of what it trains nor one number.
        """
        return list(dict.fromkeys(key for keeper in self.keepers for key in _contents(keeper)[0]))

    def scalars(self) -> dict[str, str]:
        """What the single numbers are, `step` and so on, that stand beside the moments, as `_kind` has it.

        Raises:
            ConfigError: as `moments`.
        """
        found = {key: kind for keeper in self.keepers for key, kind in _contents(keeper)[1].items()}
        return dict(sorted(found.items()))

    @property
    def optimizer_name(self) -> str | None:
        """The class of the optimizer that keeps the state; None without one."""
        return type(self.keepers[0]).__name__ if self._groups() else None

    def expect_moments(
        self, saved: Sequence[str], where: Path, scalars: Mapping[str, str], optimizer: str | None
    ) -> None:
        """Refuse another optimizer's state where that can be told. Local. Most tell theirs at a step only.

        Args:
            saved, scalars, optimizer: the state's `moments`, `scalars` and `optimizer_name`. One that counts no steps,
                or has other numbers beside them, has a state of its own, as all of PyTorch's do but Adam and AdamW;
                others' may be another's (FusedAdam, AdamW).
            where: the file that says so.

        Raises:
            FormatError: naming both.
            ConfigError: as `moments`.
        """
        advice = "resume with the optimizer of the saved run, or call load_adapter alone to begin anew with this one"
        here = self.optimizer_name
        module = type(self.keepers[0]).__module__
        own = set(scalars) != {"step"} or (module.startswith("torch.optim") and here not in ("Adam", "AdamW"))
        if own and here is not None and optimizer not in (None, here):
            raise FormatError(
                f"{where} holds the state of {optimizer} ({', '.join((*saved, *scalars))}), of which {here} cannot go "
                f"on; {advice}"
            )
        for stretch in self.stretches.values():
            make_state(stretch.optimizer, stretch.flat, stretch.group)
        for keeper in self.keepers:
            if is_bitsandbytes(keeper):
                kept = kept_moments(keeper)
                differ = bool(kept) and set(kept) != set(saved)
            else:
                kept, differ = ["others"], bool(saved) and set(saved) <= MOMENTS
            if differ:
                raise FormatError(
                    f"{where}: the moments are {', '.join(saved)}, {type(keeper).__name__} has {', '.join(kept)}; "
                    f"{advice}"
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

    def kept(self, keys: Sequence[str]) -> dict[str, dict[str, float]]:
        """Collective. The single numbers of every parameter that has state; a parameter without is left out.

        Args:
            keys: of `scalars`, on all ranks the same.
        """
        largest = self._largest_steps()
        mine = torch.zeros(len(self.sizes), 1 + len(keys), dtype=torch.float64)
        for row, name in zip(mine, self.sizes, strict=True):
            stretch = self.stretches.get(name)
            if stretch is None or stretch.start or all(value is None for value in stretch.state.values()):
                continue
            numbers = {key: value for key, value in stretch.state.items() if _kind(value)}
            if "step" in numbers:
                numbers["step"] = largest.get((id(stretch.optimizer), stretch.group), numbers["step"])
            row[0] = 1
            row[1:] = row.new_tensor([float(numbers.get(key, math.nan)) for key in keys])
        rows = self._sum(mine.view(torch.float32)).view(torch.float64).tolist()
        return {
            name: {key: n for key, n in zip(keys, numbers, strict=True) if math.isfinite(n)}
            for name, (has_state, *numbers) in zip(self.sizes, rows, strict=True)
            if has_state
        }

    def put(self, name: str, key: str, values: Tensor) -> None:
        """Set this rank's stretch of a parameter's master values or of one moment, after `put_kept`. Local.

        Args:
            name: a parameter of `stretches`.
            key: `MASTER` or a moment, which is made if the optimizer has not.
            values: (length of the stretch,).
        """
        stretch = self.stretches[name]
        if key != MASTER and getattr(stretch.state.get(key), "shape", None) != stretch.flat.shape:
            stretch.state[key] = torch.zeros_like(
                stretch.flat, dtype=_moment_dtype(stretch), requires_grad=False
            )
        with torch.no_grad():
            stretch.write(key, values)

    def put_kept(self, kept: Mapping[str, Mapping[str, float]], scalars: Mapping[str, str]) -> None:
        """Set the single numbers of parameters that have state, and clear the state of the others. Local.

        Args:
            kept, scalars: what the methods of these names gave.
        """
        for name, stretch in self.stretches.items():
            if name not in kept:
                stretch.state.clear()
        having = {name: stretch for name, stretch in self.stretches.items() if name in kept}
        for name, stretch in having.items():  # later: the state may be that of a cleared one's tensor too
            make_state(stretch.optimizer, stretch.flat, stretch.group)
            for key, value in kept[name].items():
                stretch.state[key] = _own_number(stretch, key, value, scalars.get(key, "int"))

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
                if (key in group or key == "step") and key not in HOW:  # apex counts in the group
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        return True

    @property
    def waiting(self) -> bool:
        """Whether gradients wait for the next step."""
        return False

    def refresh(self) -> None:
        """Collective. After `put`: carry master values over into the parameters that compute."""

    def _largest_steps(self) -> dict[tuple[int, int], float]:
        """The count of each group of an optimizer that counts in its last parameter's state."""
        found: dict[tuple[int, int], float] = {}
        for stretch in self.stretches.values():
            if any(cls.__name__ in COUNT_IN_THE_LAST for cls in type(stretch.optimizer).__mro__):
                key = (id(stretch.optimizer), stretch.group)
                found[key] = max(found.get(key, 0), float(stretch.state.get("step", 0)))
        return found

    def _groups(self) -> list[dict[str, Any]]:
        return self.keepers[0].param_groups

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum of what is zero on all ranks but one, as integers: every bit survives, -0.0 and NaN too."""
        if self.sharded:
            there = tensor.to(self._device)
            dist.all_reduce(there.view(torch.int32), group=self._process_group)
            tensor = there.cpu()
        return tensor


def _contents(keeper: Any) -> tuple[list[str], dict[str, str]]:
    """Names of one optimizer's moments; what its single numbers are."""
    if is_bitsandbytes(keeper):
        return kept_moments(keeper), {"step": "int"}
    moments, scalars = {}, {}
    for flat, state in keeper.state.items():
        for key, value in state.items():
            if kind := _kind(value):
                scalars[key] = kind
            elif isinstance(value, Tensor) and value.shape == flat.shape:
                moments[key] = True
            elif value is not None:
                raise ConfigError(
                    f"{type(keeper).__name__} keeps {key} of shape {tuple(getattr(value, 'shape', ()))} "
                    f"({type(value).__name__}) for a trained tensor of shape {tuple(flat.shape)}, expected that shape "
                    "or one number: no training state can hold it; use another optimizer, e.g. AdamW, or save the "
                    "adapter alone"
                )
    return list(moments), scalars


def _kind(value: Any) -> str | None:
    """How a single number is kept: int, ..., or in a tensor, torch.float32, torch.float32@device, ...; None: not so."""
    if isinstance(value, Tensor) and not value.dim():
        return str(value.dtype) + ("" if value.device.type == "cpu" else "@device")
    return next((name for name, cls in PLAIN.items() if isinstance(value, cls)), None)


def as_kept(value: Any, kind: str, device: Any = "cpu") -> Any:
    """A number as an optimizer keeps it.

    Raises:
        ValueError: it is no number, or the kind is none.
    """
    name, _, place = kind.partition("@")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if isinstance(value, (int, float)) and kind in PLAIN:
        return PLAIN[kind](value)
    if isinstance(value, (int, float)) and isinstance(dtype, torch.dtype):
        return torch.tensor(value, dtype=dtype, device=device if place else "cpu")
    raise ValueError(f"{value!r} is no {kind}")


def _moment_dtype(stretch: Stretch) -> torch.dtype:
    """The dtype in which the optimizer itself would make a moment."""
    if getattr(stretch.optimizer, "fp32_optimizer_states", False) or is_bitsandbytes(stretch.optimizer):
        return torch.float32
    return stretch.flat.dtype


def _own_number(stretch: Stretch, key: str, value: float, kind: str) -> Any:
    """A number as the optimizer in use keeps it.

    PyTorch's optimizers count in a tensor, on the device if fused or capturable; DeepSpeed's in an int.
    """
    module, group = type(stretch.optimizer).__module__, stretch.optimizer.param_groups[stretch.group]
    on_device = group.get("capturable") or group.get("fused")
    if key == "step" and module.startswith("torch.optim"):
        kind = "torch.float32"
    elif key == "step" and module.startswith(("deepspeed", "bitsandbytes")):
        kind = "int"
    if on_device and kind.startswith("torch.") and "@" not in kind:
        kind += "@device"
    return as_kept(value, kind, stretch.flat.device)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (int, float)) for v in value)
    return value is None or isinstance(value, (int, float, bool, str))
