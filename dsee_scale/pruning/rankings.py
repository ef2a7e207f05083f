"""What each weight of a pruning is ranked by: the score, its adapter, its inputs' norms."""

from __future__ import annotations

from dsee_scale.algorithms.score import Ranking, all_finite
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
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
    small = {m.param_name: m.adapter.dsee_flat for m in with_delta}  # one for all experts of a parameter
    whole = dict(zip(small, partition.gather(list(small.values())) if small else (), strict=True))
    for name, flat in whole.items():
        if not all_finite(flat):
            raise TargetError(
                f"the adapter of {name} holds NaN or infinity; load an earlier checkpoint first"
            )
    with raise_on_all_ranks(partition):
        deltas = {m.name: m.delta(whole[m.param_name]) for m in with_delta}
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
    with raise_on_all_ranks(partition):
        for member in (member for pool in pools for member in pool.members):
            if not all_finite(member.shard(partition).data):
                raise TargetError(
                    f"{member.name}.weight holds NaN or infinity; expected finite weights: check the checkpoint it "
                    "came from. Nothing was removed"
                )
            first = not member.expert
            if first and member.adapted and not all_finite(partition.shard(member.adapter.dsee_flat).data):
                raise TargetError(
                    f"the adapter of {member.name} holds NaN or infinity; load an earlier checkpoint first. "
                    "Nothing was removed"
                )
