"""Prune a model in place: local scores, one exact threshold per pool, local masks. No weight is gathered."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import torch
from torch import nn

from dsee_scale.adapters.linear import restore_under_mask
from dsee_scale.adapters.matrices import Matrix
from dsee_scale.adapters.routers import mask_routers
from dsee_scale.adapters.state import model_state, reject_unusable, warn_of_loaded_zeros
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.config import SCORES, PruneConfig
from dsee_scale.distributed import raise_on_all_ranks, show_progress
from dsee_scale.errors import CalibrationError, ConfigError
from dsee_scale.partition import Partition, open_partition, unwrap
from dsee_scale.passes.batches import Batches, named, reject_lone_batch, reject_uncounted, uncompiled
from dsee_scale.passes.calibrate import Statistics, calibrate
from dsee_scale.passes.coverage import Coverage
from dsee_scale.passes.fingerprint import fingerprint
from dsee_scale.passes.pools import WeightPool, by_expert
from dsee_scale.pruning.checks import (
    Checked,
    check_in_order,
    check_pruning,
    joint_coverage,
    note_contents,
    note_pattern,
    reject_uneven,
)
from dsee_scale.pruning.half_done import whole_or_broken
from dsee_scale.pruning.lowest import remove_in_rows, remove_lowest, remove_n_of_m
from dsee_scale.pruning.prune_report import Counts, PruneReport
from dsee_scale.pruning.rankings import find_rankings, reject_not_finite
from dsee_scale.pruning.refit.sweep import check_refit, refit
from dsee_scale.pruning.unit_scores import expert_scores, unit_scores
from dsee_scale.pruning.units import UnitPlan, choose_units, zero_units

logger = logging.getLogger(__name__)


@torch.no_grad()
def prune(
    model: nn.Module,
    config: PruneConfig | Sequence[PruneConfig],
    calibration: Statistics | Batches | None = None,
    *,
    progress: bool | None = None,
) -> PruneReport:
    """Collective. Set the least important frozen weights to zero, in place, on the shards.

    Exactly round(sparsity * entries) weights of each pool (of each matrix with scope `matrix`, of each output with
    `row`) are zero afterwards, ties included; the same scores remove the same ones on any number of ranks. With
    `refit`, the default, the weights that stay are solved anew block after block, and W + D becomes the frozen weight.
    Weights that are zero already go first, so pruning again to a higher sparsity keeps earlier zeros. Masks need no
    memory: W is frozen, so its zeros stay. Several prunings are all checked before the first one removes anything.

    Peak extra memory per rank: whole copies of the adapters in float32, and a few blocks of 2 MiB (a GPU's together
    256 MiB); with `refit`, one block's inputs, up to `gram_memory_mib` of statistics and of the block's weights, the
    parts of its matrices that the rank solves, and one whole matrix; before that, where the loss sets the shares (scope
    `global`, the default), what a backward pass through the model keeps of one batch, as a training step does.

    Args:
        model: a raw model (whole or partitioned), a DeepSpeed engine, a DDP or an Accelerate-prepared model.
        config: what to remove; several, such as heads and then neurons, one after the other.
        calibration: for scores that look at activations (`wanda`, `reap`, `frequency`): model inputs, every rank its
            own, or what `calibrate` returned; for `refit` model inputs. See `calibrate`.
        progress: show a progress bar on rank 0; None: only on a terminal.

    Returns:
        The zeros of each matrix.

    Raises:
        TargetError: nothing to prune, a score that needs adapters on a model without, a weight with NaN.
        ConfigError: pools that are empty or overlap, groups or counts that do not fit the shapes.
        CalibrationError: calibration data that are missing, empty, not finite, or statistics of another state.
        PartitionError: weights stored where an edit would not last (NVMe, quantised by DeepSpeed); or an error after
            something was written: the message says what, and nothing goes on with the model.
    """
    model = getattr(model, "_orig_mod", model)
    module = unwrap(model)
    reject_unusable(module)
    warn_of_loaded_zeros(module)
    configs = _as_list(config)
    if wanted := any(map(_looks_at_activations, configs)):
        reject_uneven(open_partition(model), calibration)
    if wanted and calibration is not None and not isinstance(calibration, Statistics):
        reject_lone_batch(calibration)
        with raise_on_all_ranks(open_partition(module), what="reading the calibration batches"):
            calibration = [named(module, batch) for batch in calibration]
    _reject_uncalibrated(configs, calibration)
    coverage = _check_all(model, configs) if len(configs) > 1 else None
    if wanted and isinstance(calibration, list):
        reject_uncounted(calibration, open_partition(module))
    with uncompiled(model):
        report = _prune_once(model, configs[0], calibration, progress)
        for number, further in enumerate(configs[1:], 1):
            later = _prune_once(model, further, calibration, progress, configs[:number])
            report = report.followed_by(later)
    note_contents(module, open_partition(module))
    return dataclasses.replace(report, coverage=coverage) if coverage else report


def _as_list(config: PruneConfig | Sequence[PruneConfig]) -> list[PruneConfig]:
    configs = list(config) if isinstance(config, Sequence) else [config]
    if not configs or not all(isinstance(each, PruneConfig) for each in configs):
        raise ConfigError(
            f"prune got {config!r:.200}; expected PruneConfig(sparsity=0.5) or the like, or several"
        )
    return configs


def _reject_uncalibrated(configs: Sequence[PruneConfig], calibration: Statistics | Batches | None) -> None:
    """Local, alike on all ranks but for an empty list, which `calibrate` refuses on all."""
    wanting = [config for config in configs if _looks_at_activations(config)]
    if wanting and calibration is None and wanting[0].refit and not SCORES[wanting[0].score].activations:
        raise CalibrationError(
            "refit solves for what the layers do on calibration data: pass calibration=batches, an iterable of the "
            "model's inputs (128 sequences are plenty), or set refit=False. Nothing was removed"
        )
    if wanting and calibration is None:
        other = "random" if wanting[0].pattern == "experts" else "W"
        raise CalibrationError(
            f"score {wanting[0].score!r} looks at activations: pass calibration=batches, an iterable of the model's "
            "inputs (128 sequences are plenty), or choose a score that does not, such as "
            f"score={other!r}. Nothing was removed"
        )
    if not isinstance(calibration, Statistics):
        return
    if any(config.refit for config in wanting):
        raise CalibrationError(
            "refit needs the batches themselves, since it runs block after block: pass calibration=batches, or set "
            "refit=False to prune by these statistics alone. Nothing was removed"
        )
    if len(wanting) > 1 or (wanting and wanting[0] is not configs[0]):
        raise CalibrationError(
            "the statistics are valid only for the first of several prunings: pass calibration=batches, so that each "
            "one sees the model that the one before it left. Nothing was removed"
        )


def _looks_at_activations(config: PruneConfig) -> bool:
    return bool(config.refit) or SCORES[config.score].activations


def _check_all(model: nn.Module, configs: Sequence[PruneConfig]) -> Coverage:
    """Collective. Refuse the first or a later pruning on every rank, before the first is written.

    The weights and adapters that the first one reads are left to its own checks, which come before it writes.

    Returns:
        What all of them reach together.
    """
    partition = open_partition(unwrap(model))
    first, *later = check_in_order(model, configs)
    for further, checked in zip(configs[1:], later, strict=True):
        find_rankings(checked.pools, further, partition)
        reject_not_finite(checked.pools, partition)
        if further.refit:
            check_refit(model, checked.pools, partition)
    return joint_coverage(unwrap(model), [first, *later], partition)


def _prune_once(
    model: nn.Module,
    config: PruneConfig,
    calibration: Statistics | Batches | None,
    progress: bool | None,
    earlier: Sequence[PruneConfig] = (),
) -> PruneReport:
    """Collective. One pattern; `earlier` are those of the same call that are done."""
    started = time.perf_counter()
    module = unwrap(model)
    partition = open_partition(module)
    with whole_or_broken(module, partition, earlier):
        checked = check_pruning(model, config, partition)
        plan, pools = checked.plan, checked.pools
        reject_not_finite(pools, partition)
        units: Counts = {}
        if plan:
            units, few = _remove_units(model, plan, config, calibration, partition, progress)
            matrices = _counts(by_expert(plan.pool.members, module, partition.shape), partition)
        elif config.refit:
            assert calibration is not None and not isinstance(calibration, Statistics)
            few = refit(model, pools, config, calibration, checked.removed, partition, progress=progress)
            matrices = _counts([member for pool in pools for member in pool.members], partition)
        else:
            matrices, few = _remove_entries(model, checked, config, calibration, partition, progress)
        model_state(module).prunings += 1
    few = [name for name in few if matrices[name][0] < matrices[name][1]]  # experts that are gone see none
    report = PruneReport(matrices, time.perf_counter() - started, units, tuple(few), checked.coverage)
    if partition.rank == 0:
        logger.info("%s", report)
    return report


def _remove_units(
    model: nn.Module,
    plan: UnitPlan,
    config: PruneConfig,
    calibration: Statistics | Batches | None,
    partition: Partition,
    progress: bool | None,
) -> tuple[Counts, list[str]]:
    """Collective. Heads, neurons or experts: those that are gone of each layer; matrices scored or left as by |W|."""
    module, pools = unwrap(model), [plan.pool]
    statistics = _statistics(model, config, calibration, partition, progress)
    if config.pattern == "experts":
        scores = expert_scores(plan.layers, config, statistics)
    else:
        scores = unit_scores(plan.layers, find_rankings(pools, config, partition, statistics), partition)
    chosen = choose_units(plan, scores)
    few = _unreached(pools, statistics) if config.pattern != "experts" else []
    if config.refit:
        assert calibration is not None and not isinstance(calibration, Statistics)
        few += refit(model, pools, config, calibration, {}, partition, chosen, progress=progress)
    else:
        zero_units(model, chosen, partition)
    if config.pattern == "experts":
        mask_routers(module, partition.shape)
    return {f"{each.layer.name} {each.layer.kind}": each.counts for each in chosen}, [*dict.fromkeys(few)]


def _remove_entries(
    model: nn.Module,
    checked: Checked,
    config: PruneConfig,
    calibration: Statistics | Batches | None,
    partition: Partition,
    progress: bool | None,
) -> tuple[Counts, list[str]]:
    """Collective. Single entries, and nothing else changes: zeros of each matrix; matrices that no token reached."""
    module, pools = unwrap(model), checked.pools
    statistics = _statistics(model, config, calibration, partition, progress)
    rankings = find_rankings(pools, config, partition, statistics)
    if config.n_of_m:
        matrices = remove_n_of_m(pools, rankings, config.n_of_m, partition, checked.removed)
    elif config.scope == "row":
        matrices = remove_in_rows(pools, rankings, partition)
    else:
        matrices = remove_lowest(pools, rankings, partition, hidden=not show_progress(progress))
    note_pattern(module, pools, config)
    restore_under_mask(module)
    return matrices, _unreached(pools, statistics)


def _unreached(pools: Sequence[WeightPool], statistics: Statistics | None) -> list[str]:
    names = [member.name for pool in pools for member in pool.members]
    return [] if statistics is None else [name for name in names if not statistics.reached(name)]


def _counts(members: Sequence[Matrix], partition: Partition) -> Counts:
    """Collective. Zeros and entries of each matrix."""
    with raise_on_all_ranks(partition):
        shards = [member.shard(partition).data for member in members]
        zeros = torch.tensor([shard.numel() - count_nonzero(shard) for shard in shards])
    counts = zip(members, partition.sum_over_shards(zeros).tolist(), strict=True)
    return {member.name: (count, member.numel) for member, count in counts}


def _statistics(
    model: nn.Module,
    config: PruneConfig,
    calibration: Statistics | Batches | None,
    partition: Partition,
    progress: bool | None,
) -> Statistics | None:
    """Collective. What score `wanda` reads.

    Raises:
        CalibrationError: they were collected on another model, or before the adapters or zeros changed.
    """
    if not SCORES[config.score].activations or calibration is None:
        return None
    if not isinstance(calibration, Statistics):
        return calibrate(model, calibration, modules=config.modules, progress=progress)
    now = fingerprint(unwrap(model), partition)
    with raise_on_all_ranks(partition):
        if calibration.fingerprint != now:
            raise CalibrationError(
                "the calibration statistics belong to another model, or to another state of its adapters or zeros; "
                "call dsee_scale.calibrate again on this one. Nothing was removed"
            )
    return calibration
