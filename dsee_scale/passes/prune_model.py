"""Prune a model in place: local scores, one exact threshold per pool, local masks. No weight is gathered."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from dsee_scale.adapters.linear import delta_record, is_adapted, restore_under_mask
from dsee_scale.algorithms.score import Ranking, all_finite, key_bits, ranked_blocks
from dsee_scale.algorithms.select import Cut, CutSearch, apply_cut_
from dsee_scale.config import SCORES_WITHOUT_ADAPTER, PruneConfig
from dsee_scale.errors import TargetError
from dsee_scale.partition import Partition, Shard, open_partition, unwrap
from dsee_scale.passes.pools import Member, WeightPool
from dsee_scale.passes.progress import show_progress
from dsee_scale.passes.prune_checks import check_in_order, check_pruning, note_pattern
from dsee_scale.passes.prune_nm import remove_n_of_m
from dsee_scale.passes.prune_structured import remove_units

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What `prune` did; printing it shows a table.

    Attributes:
        matrices: weight's module name -> (zeros, entries).
        seconds: time of the whole pass.
        units: block and kind -> (heads or neurons that are gone, all of them), for those patterns.
    """

    matrices: dict[str, tuple[int, int]]
    seconds: float
    units: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def removed(self) -> int:
        """Zeros in all pruned weights."""
        return sum(zeros for zeros, _ in self.matrices.values())

    @property
    def total(self) -> int:
        """Entries of all pruned weights."""
        return sum(numel for _, numel in self.matrices.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned weights' entries that is zero."""
        return self.removed / self.total

    def followed_by(self, later: PruneReport) -> PruneReport:
        """This report and a later one, whose counts hold where both have a matrix."""
        return PruneReport(
            {**self.matrices, **later.matrices},
            self.seconds + later.seconds,
            {**self.units, **later.units},
        )

    def __str__(self) -> str:
        groups: dict[str, list[tuple[int, int]]] = {}
        for name, counts in self.matrices.items():
            groups.setdefault(name.rsplit(".", 1)[-1], []).append(counts)
        lines = [
            f"dsee_scale: {self.removed:,} of {self.total:,} weights are zero ({100 * self.sparsity:.2f}%), "
            f"in {len(self.matrices)} matrices, {self.seconds:.1f} s"
        ]
        for kind in dict.fromkeys(name.rsplit(" ", 1)[-1] for name in self.units):
            layers = [counts for name, counts in self.units.items() if name.endswith(f" {kind}")]
            gone, all_units = map(sum, zip(*layers, strict=True))
            lines.append(f"  {gone:,} of {all_units:,} {kind} are gone, in {len(layers)} layers")
        for suffix, found in groups.items():
            shares = [100 * zeros / numel for zeros, numel in found]
            mean = 100 * sum(z for z, _ in found) / sum(n for _, n in found)
            lines.append(
                f"  {len(found):4d} x {suffix:<16} {mean:5.1f}% (from {min(shares):.1f}% to {max(shares):.1f}%)"
            )
        return "\n".join(lines)


@torch.no_grad()
def prune(model: nn.Module, config: PruneConfig, *, progress: bool | None = None) -> PruneReport:
    """Collective. Set the least important frozen weights to zero, in place, on the shards.

    Exactly round(sparsity * entries) weights of each pool are zero afterwards, ties included, the same ones
    on any number of ranks. Weights that are zero already count as removed first, so pruning again to a higher
    sparsity keeps earlier zeros. Masks need no memory: W is frozen, so its zeros stay. The patterns N:M,
    heads and neurons are described in `prune_nm` and `prune_structured`. What follows under `then` is checked
    before anything is removed.

    Peak extra memory per rank: whole copies of the adapters in float32, and a few blocks of 2 MiB.

    Args:
        model: a raw model (whole or partitioned), a DeepSpeed engine, a DDP or an Accelerate-prepared model.
        config: what to remove.
        progress: show a progress bar on rank 0; None shows it if a person watches.

    Returns:
        The zeros of each matrix.

    Raises:
        TargetError: nothing to prune, a score that needs adapters on a model without, a weight with NaN.
        ConfigError: pools that are empty or overlap, groups or counts that do not fit the shapes.
        PartitionError: weights stored where an edit would not last (NVMe, quantised by DeepSpeed).
    """
    if config.then:
        _check_all(model, config)
    report = _prune_once(model, config, progress)
    for further in config.then:
        report = report.followed_by(_prune_once(model, further, progress))
    return report


def _check_all(model: nn.Module, config: PruneConfig) -> None:
    """Collective. Refuse the first or a later pruning on every rank, before the first is written.

    The weights and adapters that the first one reads are left to its own checks, which come before it writes.
    """
    partition = open_partition(unwrap(model))
    later = check_in_order(model, (config, *config.then))[1:]
    for further, checked in zip(config.then, later, strict=True):
        _rankings(checked.pools, further, partition)
        _reject_not_finite(checked.pools, partition)


def _prune_once(model: nn.Module, config: PruneConfig, progress: bool | None) -> PruneReport:
    """Collective. One pattern."""
    started = time.perf_counter()
    module = unwrap(model)
    partition = open_partition(module)
    checked = check_pruning(model, config, partition)
    plan, pools = checked.plan, checked.pools
    rankings = _rankings(pools, config, partition)
    _reject_not_finite(pools, partition)
    units: dict[str, tuple[int, int]] = {}
    if plan:
        matrices, units = remove_units(model, module, plan, rankings, partition)
    elif config.n_of_m:
        matrices = remove_n_of_m(pools, rankings, config.n_of_m, partition, checked.removed)
    else:
        matrices = _remove_lowest(pools, rankings, partition, hidden=not show_progress(partition, progress))
    if not plan:
        note_pattern(module, matrices, config)
        restore_under_mask(module)
    report = PruneReport(matrices, time.perf_counter() - started, units)
    if partition.rank == 0:
        logger.info("%s", report)
    return report


def _rankings(pools: list[WeightPool], config: PruneConfig, partition: Partition) -> dict[str, Ranking]:
    """How each member is ranked; collects the adapters where the score reads them. Collective."""
    members = [member for pool in pools for member in pool.members]
    with_delta = [m for m in members if is_adapted(m.module) and config.score not in SCORES_WITHOUT_ADAPTER]
    small = [m.module.dsee_flat for m in with_delta]
    whole = partition.gather(small) if small else []  # type: ignore[arg-type]
    deltas = {m.name: delta_record(m.module, flat) for m, flat in zip(with_delta, whole, strict=True)}
    for name, delta in deltas.items():
        if not (all_finite(delta.a) and all_finite(delta.b) and all_finite(delta.values)):
            raise TargetError(
                f"the adapter of {name} holds NaN or infinity; load an earlier checkpoint first"
            )
    return {
        m.name: Ranking(
            mode=config.score, name=f"{m.name}.weight", delta=deltas.get(m.name), seed=config.seed
        )
        for m in members
    }


def _reject_not_finite(pools: list[WeightPool], partition: Partition) -> None:
    """Collective. Name a weight with NaN or infinity on every rank, before anything is written."""
    error = None
    for member in (member for pool in pools for member in pool.members):
        if not all_finite(partition.shard(member.param).data):
            error = TargetError(
                f"{member.name}.weight holds NaN or infinity; expected finite weights: check the checkpoint it "
                "came from. Nothing was removed"
            )
            break
    partition.raise_together(error)


def _remove_lowest(
    pools: list[WeightPool], rankings: dict[str, Ranking], partition: Partition, *, hidden: bool
) -> dict[str, tuple[int, int]]:
    """Collective. Unstructured pruning, one threshold for each pool; zeros and entries of each matrix."""
    matrices: dict[str, tuple[int, int]] = {}
    with tqdm(total=len(pools), desc="prune", unit="pool", disable=hidden) as bar:
        for pool in pools:
            cut = _find_cut(pool, rankings, partition)
            matrices.update(_apply(pool, rankings, cut, partition))
            bar.update()
    return matrices


def _find_cut(pool: WeightPool, rankings: dict[str, Ranking], partition: Partition) -> Cut:
    """Collective. The exact threshold of a pool: a few fixed-size histograms, summed over shards."""
    chosen = [rankings[member.name] for member in pool.members]
    bits = key_bits(chosen, [partition.dtype(member.param) for member in pool.members])
    search = CutSearch(pool.num_remove, pool.total, bits, device=partition.device)
    while search.cut is None:
        for member in pool.members:
            shard = partition.shard(member.param)
            for _, ranked, position in _blocks(member, shard, rankings[member.name], search):
                search.count(ranked, member.start + position)
        search.advance(partition.sum_over_shards(search.histogram))
    return search.cut


def _blocks(
    member: Member, shard: Shard, ranking: Ranking, search: CutSearch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    def wants(start: int, numel: int) -> bool:
        return search.wants(member.start + start, numel)

    return ranked_blocks(shard.data, shard.start, ranking, wants)


def _apply(
    pool: WeightPool, rankings: dict[str, Ranking], cut: Cut, partition: Partition
) -> dict[str, tuple[int, int]]:
    """Collective. Write the zeros to every stored copy; returns zeros and entries of each matrix."""
    zeros = torch.zeros(len(pool.members), dtype=torch.int64)
    for index, member in enumerate(pool.members):
        with partition.edit(member.param) as stretches:
            zeros[index], *_ = [_apply_to(member, each, rankings[member.name], cut) for each in stretches]
    counts = partition.sum_over_shards(zeros).tolist()
    return {member.name: (count, member.numel) for member, count in zip(pool.members, counts, strict=True)}


def _apply_to(member: Member, stored: Shard, ranking: Ranking, cut: Cut) -> int:
    return sum(
        apply_cut_(entries, ranked, member.start + position, cut)
        for entries, ranked, position in ranked_blocks(stored.data, stored.start, ranking)
    )
