"""What each weight of a pruning is ranked by: the score, its adapter, its inputs' norms."""

from __future__ import annotations

from dsee_scale.adapters.linear import delta_record
from dsee_scale.algorithms.score import Ranking, all_finite
from dsee_scale.config import PruneConfig
from dsee_scale.errors import TargetError
from dsee_scale.partition import Partition
from dsee_scale.passes.calibrate import Statistics
from dsee_scale.passes.pools import WeightPool


def find_rankings(
    pools: list[WeightPool], config: PruneConfig, partition: Partition, statistics: Statistics | None = None
) -> dict[str, Ranking]:
    """How each member is ranked; collects the adapters where the score reads them. Collective."""
    members = [member for pool in pools for member in pool.members]
    with_delta = [m for m in members if m.adapted and config.score not in ("W", "random")]
    small = [m.module.dsee_flat for m in with_delta]
    whole = partition.gather(small) if small else []  # type: ignore[arg-type]
    for member, flat in zip(with_delta, whole, strict=True):
        if not all_finite(flat):
            raise TargetError(
                f"the adapter of {member.name} holds NaN or infinity; load an earlier checkpoint first"
            )
    deltas = {m.name: delta_record(m.module, flat) for m, flat in zip(with_delta, whole, strict=True)}
    norms = {m.name: statistics.norms(m.name) for m in members} if statistics is not None else {}
    return {
        m.name: Ranking(
            mode=config.score,
            name=f"{m.name}.weight",
            delta=deltas.get(m.name),
            norms=norms.get(m.name),
            shape=m.shape,
            transposed=m.transposed,
            seed=config.seed,
        )
        for m in members
    }


def reject_not_finite(pools: list[WeightPool], partition: Partition) -> None:
    """Collective. Name a weight or an adapter with NaN or infinity on every rank, before anything is written."""
    error = None
    for member in (member for pool in pools for member in pool.members):
        if not all_finite(member.shard(partition).data):
            error = TargetError(
                f"{member.name}.weight holds NaN or infinity; expected finite weights: check the checkpoint it "
                "came from. Nothing was removed"
            )
            break
        if member.adapted and not all_finite(partition.shard(member.module.dsee_flat).data):  # type: ignore[arg-type]
            error = TargetError(
                f"the adapter of {member.name} holds NaN or infinity; load an earlier checkpoint first. "
                "Nothing was removed"
            )
            break
    partition.raise_together(error)
