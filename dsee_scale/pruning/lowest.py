"""Unstructured pruning on shards: one exact threshold for each pool, found without gathering a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.score import Ranking, key_bits, ranked_blocks
from dsee_scale.algorithms.select import Cut, CutSearch, apply_cut_
from dsee_scale.partition import Partition, Shard
from dsee_scale.passes.pools import WeightPool


def remove_lowest(
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
        for member, begin in zip(pool.members, pool.starts, strict=True):
            shard = member.shard(partition)
            for _, ranked, position in _blocks(begin, shard, rankings[member.name], search):
                search.count(ranked, begin + position)
        search.advance(partition.sum_over_shards(search.histogram))
    return search.cut


def _blocks(
    begin: int, shard: Shard, ranking: Ranking, search: CutSearch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    def wants(start: int, numel: int) -> bool:
        return search.wants(begin + start, numel)

    return ranked_blocks(shard.data, shard.start, ranking, wants)


def _apply(
    pool: WeightPool, rankings: dict[str, Ranking], cut: Cut, partition: Partition
) -> dict[str, tuple[int, int]]:
    """Collective. Write the zeros to every stored copy; returns zeros and entries of each matrix."""
    zeros = torch.zeros(len(pool.members), dtype=torch.int64)
    for index, (member, begin) in enumerate(zip(pool.members, pool.starts, strict=True)):
        with member.edit(partition) as stretches:
            zeros[index], *_ = [_apply_to(begin, each, rankings[member.name], cut) for each in stretches]
    counts = partition.sum_over_shards(zeros).tolist()
    return {member.name: (count, member.numel) for member, count in zip(pool.members, counts, strict=True)}


def _apply_to(begin: int, stored: Shard, ranking: Ranking, cut: Cut) -> int:
    if cut.key == 0:  # as many as were to go, or more, are zero already
        return stored.data.numel() - count_nonzero(stored.data)
    zeros: int | torch.Tensor = 0
    for entries, ranked, position in ranked_blocks(stored.data, stored.start, ranking):
        zeros = zeros + apply_cut_(entries, ranked, begin + position, cut)
    return int(zeros)  # one wait for each matrix on an accelerator
