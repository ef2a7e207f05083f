"""What a pruning means and whether it can be done, from names, shapes, settings and the record: nothing is scored.

Of several prunings all are checked before the first one writes: the record of what is removed, which all of these
checks read, pretends meanwhile that the earlier ones are done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers, computes_product
from dsee_scale.adapters.matrices import Matrix
from dsee_scale.adapters.removed_units import record_removed, removed_inputs
from dsee_scale.adapters.state import MASK_UPDATE, model_state
from dsee_scale.adapters.targets import reject_codes
from dsee_scale.config import SCORES, PruneConfig
from dsee_scale.distributed import gather_objects
from dsee_scale.errors import CalibrationError, ConfigError, TargetError
from dsee_scale.partition import Partition, open_partition, unwrap
from dsee_scale.partition.engine_state import owned_by_deepspeed
from dsee_scale.passes.calibrate import Statistics
from dsee_scale.passes.coverage import LEAST, Coverage, block_coverage
from dsee_scale.passes.fingerprint import contents
from dsee_scale.passes.pools import WeightPool, block_matrices, find_pools
from dsee_scale.pruning.lowest import check_divisible
from dsee_scale.pruning.refit.ready import ready_blocks
from dsee_scale.pruning.units import UnitPlan, check_units_reachable, plan_units


@dataclass(frozen=True)
class Checked:
    """One pruning that can be done.

    Attributes:
        plan: the heads or neurons, for these patterns.
        pools: the weights.
        removed: for N:M, the inputs that went with heads or neurons before, as `removed_inputs` gives them.
        coverage: how much of the blocks the pools are.
    """

    plan: UnitPlan | None
    pools: list[WeightPool]
    removed: dict[str, Tensor]
    coverage: Coverage


def check_pruning(
    model: nn.Module,
    config: PruneConfig,
    partition: Partition,
    uncounted: Mapping[str, tuple[str, int]] | None = None,
) -> Checked:
    """Refuse a pruning that makes no sense on the model as its record says it is. Local, alike on all ranks.

    Args:
        model: what `prune` was given.
        config: one pruning.
        partition: port to the weights.
        uncounted: matrices that lose a number of inputs which only scores will tell: module name -> heads or
            neurons, inputs of one unit.
    """
    module = unwrap(model)
    plan = plan_units(module, config, partition.shape) if config.removes_units else None
    pools = [plan.pool] if plan else find_pools(module, config, partition.shape)
    removed: dict[str, Tensor] = {}
    if config.n_of_m:
        _reject_uncounted(pools, config.pattern, config.n_of_m[1], uncounted or {})
        removed = removed_inputs(module, partition.shape)
        check_divisible(pools, config.n_of_m[1], removed)
    coverage = _coverage(module, pools, config, partition)
    _reject_unready(model, module, pools, config, partition)
    if plan:
        check_units_reachable(model, plan)
    return Checked(plan, pools, removed, coverage)


def check_in_order(model: nn.Module, configs: Sequence[PruneConfig]) -> list[Checked]:
    """Check prunings as if those before each were done already; the record is put back. Local, alike on all ranks."""
    module = unwrap(model)
    partition, state = open_partition(module), model_state(module)
    uncounted: dict[str, tuple[str, int]] = {}
    actual, state.pruned = state.pruned, dict(state.pruned)
    try:
        found = []
        for config in configs:
            found.append(check_pruning(model, config, partition, uncounted))
            _pretend(module, config, found[-1], uncounted)
        return found
    finally:
        state.pruned = actual


def joint_coverage(module: nn.Module, prunings: Sequence[Checked], partition: Partition) -> Coverage:
    """What several prunings reach together. Local."""
    members = [member for each in prunings for pool in each.pools for member in pool.members]
    return block_coverage(module, members, block_matrices(module, partition.shape).values(), partition.shape)


def note_pattern(module: nn.Module, pools: Sequence[WeightPool], config: PruneConfig) -> None:
    """Record the pattern within weights, and how updates are trained on; of experts, for all of a parameter."""
    pruned = model_state(module).pruned
    for member in (member for pool in pools for member in pool.members):
        how = {**pruned.get(member.param_name, {})}
        if config.n_of_m or ":" not in str(
            how.get("pattern")
        ):  # further zeros leave groups of N:M what they are
            how["pattern"] = config.pattern
        # Of one without an update a later `inject` takes the default.
        if member.adapted or not config.mask_update:
            how[MASK_UPDATE] = config.mask_update
        pruned[member.param_name] = how


def note_contents(module: nn.Module, partition: Partition) -> None:
    """Collective. Record checksums of re-fitted weights anew: the base model's files do not hold them."""
    pruned, params = model_state(module).pruned, dict(module.named_parameters())
    refitted = {name: params[name] for name, how in pruned.items() if "content" in how}
    for name, content in contents(refitted, partition).items():
        pruned[name] = {**pruned[name], "content": content}


def _pretend(
    module: nn.Module, config: PruneConfig, checked: Checked, uncounted: dict[str, tuple[str, int]]
) -> None:
    """Record as many units as will be gone, whichever they are: the checks only count. Else note the matrices."""
    plan = checked.plan
    if plan is None:
        note_pattern(module, checked.pools, config)
    elif len(plan.budget) == len(plan.layers):
        for layer, gone, budget in zip(plan.layers, plan.gone, plan.budget, strict=True):
            run, count = layer.num_units // layer.groups, max(budget, int(gone.sum()))
            record_removed(module, layer, torch.arange(layer.num_units) % run < count // layer.groups)
    else:
        for layer in plan.layers:
            after = (layer.kind, layer.unit_size * layer.head_size)
            uncounted.update({part.name: after for part in layer.parts if part.side == "inputs"})


def _reject_uncounted(
    pools: Sequence[WeightPool], pattern: str, m: int, uncounted: Mapping[str, tuple[str, int]]
) -> None:
    for name in (member.name for pool in pools for member in pool.members):
        kind, inputs = uncounted.get(name, ("", 0))
        if inputs % m:
            raise ConfigError(
                f"{name} is to become {pattern}, and how many of its inputs are left after {kind} with "
                f"scope 'global' is known only once they are gone; expected a multiple of {m}. Give the {kind} "
                f"num_per_layer or scope='matrix', or call prune for {pattern} apart, after them. Nothing was removed"
            )


def _reject_unready(
    model: nn.Module, module: nn.Module, pools: list[WeightPool], config: PruneConfig, partition: Partition
) -> None:
    if SCORES[config.score].needs_adapter and not adapted_layers(module):
        raise TargetError(
            f"score {config.score!r} needs adapters and the model has none; call dsee_scale.inject(model, ...) "
            "first, or choose score='W'"
        )
    known_to_train = model is not module or bool(adapted_layers(module))
    for pool in pools:
        for member in pool.members:
            name = member.param_name
            partition.writable(name, member.param)
            reject_codes(member.name, member.module, member.param)
            _reject_own_forward(member, config)
            if member.param.requires_grad and (known_to_train or _has_trained(member.param)):
                raise TargetError(
                    f"{name} is being trained, so its zeros would not stay; expected frozen weights: call "
                    "dsee_scale.inject(model, ...) before the engine is made, or leave this module out of the pruning "
                    "(PruneConfig.modules) and of trained_modules"
                )
    if config.refit:
        ready_blocks(module, pools, partition)


def _reject_own_forward(member: Matrix, config: PruneConfig) -> None:
    """Raise TargetError where a pruning would compute another product than the layer's class does."""
    masked = member.adapted and config.mask_update
    if (masked or config.refit) and not computes_product(member.module):
        what = "trained under its mask" if masked else "re-fitted"
        advice = "mask_update=False and refit=False" if masked else "refit=False"
        base = getattr(member.module, "dsee_base", type(member.module))
        raise TargetError(
            f"{member.name} is a {base.__name__}, whose forward is its own; expected x W^T + bias of a layer that is "
            f"{what}: leave it out of PruneConfig.modules, or set {advice}. Nothing was removed"
        )


def reject_uneven(partition: Partition, calibration: Any) -> None:
    """Collective. Refuse calibration data that some ranks lack, or have in another form, or statistics of their own.

    Raises:
        CalibrationError: on every rank.
    """
    kinds = ("nothing", "statistics", "batches", "one batch that is in no list")
    mine = 0 if calibration is None else 1 if isinstance(calibration, Statistics) else 2
    mine += isinstance(calibration, (Mapping, Tensor))
    ranks = partition.sum_over_ranks(torch.eye(len(kinds), dtype=torch.int64)[mine]).tolist()
    if ranks[mine] != partition.world_size:
        found = ", ".join(
            f"{number} with {kind}" for kind, number in zip(kinds, ranks, strict=True) if number
        )
        raise CalibrationError(
            f"`calibration` differs between the {partition.world_size} ranks: {found}; expected the same on all of "
            "them, each rank with batches of its own. Nothing was removed"
        )
    digests = gather_objects(_digest(calibration) if isinstance(calibration, Statistics) else "")
    if len(set(digests)) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise CalibrationError(
            f"`calibration` differs between the ranks: rank {other}'s statistics are not rank 0's; expected what one "
            "call of `calibrate` returned, or the same file on all of them. Nothing was removed"
        )


def _digest(statistics: Statistics) -> str:
    """SHA-256 of all values. Local."""
    gated = {name: list(sums) for name, sums in statistics.gated.items()}
    found = hashlib.sha256(
        json.dumps([statistics.fingerprint, dict(statistics.tokens), gated], sort_keys=True).encode()
    )
    for name in sorted(statistics.squares):
        found.update(name.encode() + statistics.squares[name].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _has_trained(param: nn.Parameter) -> bool:
    """Whether somebody trains a parameter, where the model itself does not tell."""
    return param.grad is not None or owned_by_deepspeed(param)


def _coverage(
    module: nn.Module, pools: Sequence[WeightPool], config: PruneConfig, partition: Partition
) -> Coverage:
    """What a pruning covers; refuse "every linear weight" where that is a small part of the blocks, as with experts."""
    reachable = block_matrices(module, partition.shape)
    members = [member for pool in pools for member in pool.members]
    coverage = block_coverage(module, members, reachable.values(), partition.shape)
    beyond = sum(coverage.missed.values())
    told = config.removes_units or config.modules or (config.pools and all(p.modules for p in config.pools))
    if not told and beyond > (1 - LEAST) * coverage.total:
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in reachable})
        raise TargetError(
            f"pruning reaches only {coverage.total - beyond:,} of the blocks' {coverage.total:,} matrix "
            f"parameters ({100 * (1 - beyond / coverage.total):.1f}%): {coverage.names()} are in no linear layer. If "
            f"you mean to prune only the others, set modules={suffixes}"
        )
    return coverage
