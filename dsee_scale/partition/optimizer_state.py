"""What an optimizer keeps about the trained parameters, told apart from how DeepSpeed stores it.

Every engine keeps float32 master values and moments in flat tensors, of which a rank holds some stretches
of some parameters. A `Stretch` says where. ZeRO-3 cuts each parameter evenly, ZeRO-1, ZeRO-2 and the bf16
optimizer cut one long flat tensor per group, a plain optimizer keeps whole parameters.

DeepSpeed's own setters (`safe_set_full_fp32_param` and the like, 0.19.8) fail on sizes that do not divide by
the number of ranks, and know no optimizer state before the first step; hence the work on its flat tensors.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsee_scale.distributed import communication_device
from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import Partition, is_engine, open_partition, unwrap
from dsee_scale.partition.eight_bit_moments import is_eight_bit, make_state, read_moment, write_moment

MASTER = "master"
"""Key of a parameter's own values in the optimizer's precision, beside `exp_avg` and so on."""


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
        """Names of the moments, `exp_avg` and so on; empty before the first step."""
        found = {
            key: None
            for keeper in self._keepers
            for flat, state in keeper.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() and value.shape == flat.shape
        }
        return list(found)

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
        """Set this rank's stretch of a parameter's master values or of one moment. Local.

        Args:
            name: a parameter of `stretches`.
            key: `MASTER` or a moment, which is made if the optimizer has made no step yet.
            values: (length of the stretch,).
        """
        stretch = self.stretches[name]
        if key != MASTER:
            make_state(stretch.optimizer, stretch.flat)
            if key not in stretch.state:
                stretch.state[key] = torch.zeros_like(
                    stretch.flat, dtype=_moment_dtype(stretch), requires_grad=False
                )
        with torch.no_grad():
            stretch.write(key, values)

    def put_steps(self, steps: Mapping[str, int]) -> None:
        """Set the number of updates, as the optimizer in use keeps it. Local. Zero clears a state."""
        for name, stretch in self.stretches.items():
            if steps.get(name, 0) == 0:
                stretch.state.clear()
            else:
                stretch.state["step"] = _step_value(stretch, steps[name])

    def groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer's groups (lr, betas, ...) that are plain values."""
        return [{key: value for key, value in g.items() if _is_plain(value)} for g in self._groups()]

    def put_groups(self, saved: Sequence[Mapping[str, Any]]) -> bool:
        """Set the groups' settings; False, and nothing done, where their number differs. Local."""
        if len(saved) != len(self._groups()):
            return False
        for group, values in zip(self._groups(), saved, strict=True):
            for key, value in values.items():
                if key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value
        return True

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


class Zero3State(OptimizerState):
    """DeepSpeed ZeRO-3, offloaded to CPU or not."""

    def __init__(
        self,
        engine_optimizer: Any,
        named: Mapping[str, nn.Parameter],
        sizes: Mapping[str, int],
        partition: Partition,
    ) -> None:
        self.zero, self.partition, self.params = engine_optimizer, partition, list(named.values())
        stretches = {}
        for name, param in named.items():
            group, offset, stored = self.zero.grad_position[self.zero.get_param_id(param)]
            rank = self.zero._get_param_partition_rank(param)
            start = min(rank * stored, sizes[name])
            length = min(stored, sizes[name] - start)
            if length:
                stretches[name] = Stretch(
                    start,
                    length,
                    self.zero.fp32_partitioned_groups_flat[group],
                    offset,
                    self._keeper(group),
                    self.zero.sub_group_to_group_id[group],
                )
        process_group = self.zero._get_param_partition_group(next(iter(named.values())))
        device = communication_device(process_group, torch.device("cpu"))
        keepers = [self.zero.optimizer, *filter(None, [getattr(self.zero, "backup_optimizer", None)])]
        super().__init__(stretches, sizes, keepers, group=process_group, sharded=True, device=device)

    def refresh(self) -> None:
        """Collective. Masters to shards, and from there to trained parameters that are resident, in one transfer.

        DeepSpeed's own way (`checkpoint_event_epilogue`) gathers every resident parameter, frozen ones too.
        """
        for index in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self.zero.invalidate_secondary_tensor()
        resident = [param for param in self.params if param.data.numel()]
        for param, value in zip(resident, self.partition.gather(resident), strict=True):
            param.data.copy_(value)

    def _keeper(self, group: int) -> Any:
        where = getattr(self.zero, "subgroup_to_device", {}).get(group, "cpu")
        return self.zero.optimizer if where == "cpu" else self.zero.backup_optimizer


class FlatGroupsState(OptimizerState):
    """DeepSpeed ZeRO-1, ZeRO-2 and the bf16 optimizer: one long flat tensor per group, cut at any place."""

    def __init__(
        self,
        engine_optimizer: Any,
        named: Mapping[str, nn.Parameter],
        sizes: Mapping[str, int],
        partition: Partition,
    ) -> None:
        self.zero = engine_optimizer
        flats = getattr(self.zero, "single_partition_of_fp32_groups", None)
        flats = self.zero.fp32_groups_flat_partition if flats is None else flats
        stretches, process_group = {}, None
        for name, param in named.items():
            process_group = param._dp_group  # type: ignore[attr-defined]
            mapping = param._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                group = mapping.param_group_index
                stretches[name] = Stretch(
                    there.start, there.numel, flats[group], here.start, self.zero.optimizer, group
                )
        device = communication_device(process_group, torch.device("cpu"))
        super().__init__(
            stretches, sizes, [self.zero.optimizer], group=process_group, sharded=True, device=device
        )

    def refresh(self) -> None:
        """Collective. Masters to the parameters of every rank; link moments that `put` made."""
        self.zero._hp_optimizer_states_linked = False
        if all(stretch.state for stretch in self.stretches.values()):
            self.zero._lazy_init_hp_params_optimizer_state()
        self.zero.update_lp_params()


def open_optimizer(model: nn.Module, optimizer: Any = None) -> OptimizerState:
    """The optimizer state behind a DeepSpeed engine, or of a plain optimizer.

    Args:
        model: an engine, or a model with the optimizer given apart.
        optimizer: a torch optimizer, or Accelerate's wrapper; unused with an engine. None, without an
            engine, gives the parameters alone.

    Raises:
        PartitionError: a kind of engine whose state cannot be reached.
        TargetError: nothing is trained.
    """
    named = {name: param for name, param in unwrap(model).named_parameters() if param.requires_grad}
    if not named:
        raise TargetError("the model has no trainable parameter; call dsee_scale.inject first")
    partition = open_partition(model)
    sizes = {name: partition.shape(param).numel() for name, param in named.items()}
    if is_engine(model):
        optimizer = model.optimizer
    while hasattr(optimizer, "optimizer") and not _is_deepspeed(optimizer):
        optimizer = optimizer.optimizer
    if _is_deepspeed(optimizer):
        _reject_unreachable(optimizer)
        _reject_unknown(optimizer, named)
        kind = Zero3State if hasattr(optimizer, "fp32_partitioned_groups_flat") else FlatGroupsState
        return kind(optimizer, named, sizes, partition)
    return _plain_state(named, sizes, optimizer)


def _is_deepspeed(optimizer: Any) -> bool:
    return any(cls.__name__ == "DeepSpeedOptimizer" for cls in type(optimizer).__mro__)


def _reject_unreachable(optimizer: Any) -> None:
    kinds = [cls.__name__ for cls in type(optimizer).__mro__]
    reason = None
    if getattr(optimizer, "swap_optimizer", False):
        reason = 'the optimizer is offloaded to NVMe; set "offload_optimizer": {"device": "cpu"}'
    elif any("SuperOffload" in kind or "ZenFlow" in kind for kind in kinds) or getattr(
        optimizer, "zenflow", False
    ):
        reason = f"{kinds[0]} keeps its state elsewhere; turn SuperOffload and ZenFlow off"
    elif not any(hasattr(optimizer, a) for a in ("fp32_partitioned_groups_flat", "update_lp_params")):
        reason = f"{kinds[0]} is not supported; use ZeRO stage 1, 2 or 3, or bf16"
    if reason:
        raise PartitionError(
            f"the optimizer state cannot be saved or loaded: {reason} in the DeepSpeed config"
        )


def _reject_unknown(optimizer: Any, named: Mapping[str, nn.Parameter]) -> None:
    groups: Iterable[Any] = next(
        getattr(optimizer, a) for a in ("fp16_groups", "bit16_groups", "bf16_groups") if hasattr(optimizer, a)
    )
    known = {id(param) for group in groups for param in group}
    missing = [name for name, param in named.items() if id(param) not in known]
    if missing:
        raise PartitionError(
            f"{missing[0]} and {len(missing) - 1} more trainable parameters are unknown to the optimizer; "
            "give model_parameters=dsee_scale.trainable_parameters(model) to deepspeed.initialize"
        )


def _plain_state(
    named: Mapping[str, nn.Parameter], sizes: Mapping[str, int], optimizer: Any
) -> OptimizerState:
    keeper = optimizer if optimizer is not None else _NoOptimizer()
    where = {id(param): index for index, group in enumerate(keeper.param_groups) for param in group["params"]}
    stretches = {
        name: Stretch(0, param.numel(), param, 0, keeper, where.get(id(param), 0))
        for name, param in named.items()
    }
    return OptimizerState(stretches, sizes, [keeper], device=torch.device("cpu"))


class _NoOptimizer:
    """Keeps nothing, for a model without an optimizer."""

    def __init__(self) -> None:
        self.state: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []


def _moment_dtype(stretch: Stretch) -> torch.dtype:
    """The dtype in which the optimizer itself would make a moment."""
    if getattr(stretch.optimizer, "fp32_optimizer_states", False):
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
