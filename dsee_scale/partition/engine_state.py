"""The optimizer behind a model: which one it is, and where a DeepSpeed engine keeps its state."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsee_scale.distributed import communication_device
from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import Partition, is_engine, open_partition, unwrap
from dsee_scale.partition.master_weights import MasterWeights
from dsee_scale.partition.optimizer_state import OptimizerState, Stretch
from dsee_scale.partition.ranks import settle


@contextlib.contextmanager
def no_leaf_gradients(model: nn.Module) -> Iterator[None]:
    """Local. For a backward pass of one's own through an engine's model, in which no parameter wants a gradient.

    DeepSpeed (0.19.8) reduces gradients of zero for every parameter of a leaf module of ZeRO-3, as the blocks of
    Mixtral and Qwen-MoE are, in any backward pass, and the next training step would stumble over them.
    """
    optimizer = getattr(model, "optimizer", None) if is_engine(model) else None
    taken = []
    for handle in getattr(optimizer, "_leaf_module_hooks", ()):
        hooks = handle.hooks_dict_ref()
        taken.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


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

    @property
    def waiting(self) -> bool:
        """Whether gradients wait for the next step."""
        return self.zero.micro_step_id > 0 or self.zero._epilogue_ran_this_backward

    def refresh(self) -> None:
        """Collective. Masters to shards, and from there to trained parameters that are resident, in one transfer.

        DeepSpeed's own way (`checkpoint_event_epilogue`) gathers every resident parameter, frozen ones too.
        """
        for index in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self.zero.invalidate_secondary_tensor()
        resident: list[Any] = [
            param
            for param in self.params
            if param.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined]
        ]
        for param, value in zip(resident, self.partition.gather(resident), strict=True):
            param.data.copy_(value)
        settle(self.params[0].device)

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
        shuffled = self._round_robin() if getattr(self.zero, "round_robin_gradients", False) else {}
        for name, param in named.items():
            process_group = param._dp_group  # type: ignore[attr-defined]
            mapping = param._hp_mapping  # type: ignore[attr-defined]
            if shuffled:
                group, start, length, offset = shuffled[id(param)]
            elif mapping is None:
                continue
            else:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                group, start, length, offset = mapping.param_group_index, there.start, there.numel, here.start
            if length > 0:
                stretches[name] = Stretch(start, length, flats[group], offset, self.zero.optimizer, group)
        device = communication_device(process_group, torch.device("cpu"))
        super().__init__(
            stretches, sizes, [self.zero.optimizer], group=process_group, sharded=True, device=device
        )

    def _round_robin(self) -> dict[int, tuple[int, int, int, int]]:
        """By a parameter's id: group, and where this rank's entries of it begin, how many, and where they are kept.

        `round_robin_gradients` puts a group's parameters into another order, which DeepSpeed's own `_hp_mapping`
        doesn't know of (0.19.8).
        """
        found = {}
        for group, params in enumerate(self.zero.round_robin_bit16_groups):
            ranks = self.zero.real_dp_process_group[group]
            size = self.zero.bit16_groups_flat[group].numel() // dist.get_world_size(ranks)
            first = size * dist.get_rank(ranks)
            every = getattr(self.zero, "round_robin_bit16_padding", None)  # older versions have none
            paddings, at = every[group] if every else [0] * len(params), 0
            for param, padding in zip(params, paddings, strict=True):
                start, stop = max(first - at, 0), min(first + size - at, param.numel())
                found[id(param)] = group, start, stop - start, at + start - first
                at += param.numel() + padding
        return found

    @property
    def waiting(self) -> bool:
        """Whether gradients wait for the next step."""
        if hasattr(self.zero, "fp32_groups_has_gradients"):  # the bf16 optimizer
            return any(any(group) for group in self.zero.fp32_groups_has_gradients)
        return self.zero.micro_step_id >= 0

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
        if type(optimizer).__name__ == "DeepSpeedZeRoOffload":  # ZeRO-3 without an optimizer
            optimizer = None
    while hasattr(optimizer, "optimizer") and not _is_deepspeed(optimizer):
        optimizer = optimizer.optimizer
    if _is_deepspeed(optimizer):
        _reject_unreachable(optimizer)
        _reject_unknown(optimizer, named)
        kind = Zero3State if hasattr(optimizer, "fp32_partitioned_groups_flat") else FlatGroupsState
        return kind(optimizer, named, sizes, partition)
    return PlainState(named, sizes, _NoOptimizer() if optimizer is None else optimizer)


def owned_by_deepspeed(param: nn.Parameter) -> bool:
    """Whether a DeepSpeed optimizer trains this parameter, told without its engine; stage 0 leaves no mark on it."""
    return any(hasattr(param, mark) for mark in ("_z3_optimizer", "_hp_mapping"))


def within_an_engine(module: nn.Module) -> bool:
    """Whether a DeepSpeed engine calls this module, told by the hooks that it puts there."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(getattr(hook, "__qualname__", "").startswith("DeepSpeedEngine.") for hook in hooks)


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


class PlainState(OptimizerState):
    """A plain optimizer: whole parameters, or float32 masters of them."""

    def __init__(self, named: Mapping[str, nn.Parameter], sizes: Mapping[str, int], keeper: Any) -> None:
        self._keeper, masters = keeper, {}
        if isinstance(keeper, MasterWeights):
            keeper.take_over()
            masters = keeper.masters
        flats = {name: masters.get(param, param) for name, param in named.items()}
        groups = enumerate(keeper.param_groups)
        where = {id(param): index for index, group in groups for param in group["params"]}
        stretches = {
            name: Stretch(0, flat.numel(), flat, 0, keeper, where.get(id(flat), 0))
            for name, flat in flats.items()
        }
        super().__init__(stretches, sizes, [keeper], device=torch.device("cpu"))

    def refresh(self) -> None:
        """Local. Masters to the parameters."""
        if isinstance(self._keeper, MasterWeights):
            self._keeper.give_back()


class _NoOptimizer:
    """Keeps nothing, for a model without an optimizer."""

    def __init__(self) -> None:
        self.state: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
