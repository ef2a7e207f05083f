"""Pruning on shards: the lowest entries of a pool, of N:M groups, or of whole rows go; no weight is gathered.

A pool has one exact threshold. Of groups, of each M neighbours along the input, the N of highest score stay.

Along the input a Linear's weight (O x I) is contiguous: a group is M consecutive entries. In a Conv1D's
(I x O) a group is a column of M rows. In both cases the weight falls apart into *slabs* of consecutive
entries that hold whole groups, M or M x O long. A shard chooses within its whole slabs alone; only the keys
of the few slabs that an edge of a shard cuts travel between ranks, never a weight.

Where inputs are gone because heads or neurons were removed, groups are formed among those that are left, as
the exported matrix has them; unless whole groups went, a slab is then a row of a Linear, or a whole Conv1D.

With scope `row` the group is all inputs of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.algorithms.bits import count_nonzero, is_host
from dsee_scale.algorithms.patterns import key_blocks, lowest_in_groups, whole_slabs
from dsee_scale.algorithms.score import Ranking, key_bits, ranked_blocks
from dsee_scale.algorithms.select import Cut, CutSearch, apply_cut_
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError
from dsee_scale.partition import Partition, Shard
from dsee_scale.passes.pools import WeightPool

SAMPLE_FROM = 2**26
"""Entries of a pool on an accelerator from which a sample is worth its message."""


def remove_lowest(
    pools: list[WeightPool], rankings: dict[str, Ranking], partition: Partition, *, hidden: bool
) -> dict[str, tuple[int, int]]:
    """Collective. Unstructured pruning, one threshold for each pool; zeros and entries of each matrix."""
    matrices: dict[str, tuple[int, int]] = {}
    pools = [part for pool in pools for part in _comparable(pool, rankings)]
    with tqdm(total=len(pools), desc="prune", unit="pool", disable=hidden) as bar:
        for pool in pools:
            cut = _find_cut(pool, rankings, partition)
            matrices.update(_remove_below(pool, rankings, cut, partition))
            bar.update()
    return matrices


def _comparable(pool: WeightPool, rankings: dict[str, Ranking]) -> Iterator[WeightPool]:
    """Matrices that no token reached lose the pool's share each: |W| is no measure beside |W + D| times a norm."""
    alone = [m for m in pool.members if rankings[m.name].mode == "wanda" and rankings[m.name].norms is None]
    if len(alone) in (0, len(pool.members)):
        yield pool
        return
    apart = [WeightPool(m.name, pool.sparsity, (m,)) for m in alone]
    names = {m.name for m in alone}
    rest = WeightPool(pool.name, pool.sparsity, tuple(m for m in pool.members if m.name not in names))
    # Where all are tiny, rounding each may take more than the pool's, or less.
    left = min(max(pool.num_remove - sum(each.num_remove for each in apart), 0), rest.total - 1)
    yield from (*apart, replace(rest, sparsity=left / rest.total))


def _find_cut(pool: WeightPool, rankings: dict[str, Ranking], partition: Partition) -> Cut:
    """Collective. The exact threshold of a pool: a few fixed-size histograms, summed over shards."""
    chosen = [rankings[member.name] for member in pool.members]
    bits = key_bits(chosen, [partition.dtype(member.param) for member in pool.members])
    cheap = all(ranking.by_magnitude for ranking in chosen) and not is_host(partition.device)
    sampled = cheap and pool.total >= SAMPLE_FROM
    search = CutSearch(pool.num_remove, pool.total, bits, device=partition.device, sampled=sampled)
    while search.cut is None:
        with raise_on_all_ranks(partition):
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


def _remove_below(
    pool: WeightPool, rankings: dict[str, Ranking], cut: Cut, partition: Partition
) -> dict[str, tuple[int, int]]:
    """Collective. Write the zeros to every stored copy; returns zeros and entries of each matrix."""
    found = []
    with raise_on_all_ranks(partition):
        for member, begin in zip(pool.members, pool.starts, strict=True):
            with member.edit(partition) as stretches:
                own, *_ = [_apply_to(begin, each, rankings[member.name], cut) for each in stretches]
            found.append(own)
        zeros = torch.tensor([int(count) for count in found])  # on an accelerator one wait for all
    counts = partition.sum_over_shards(zeros).tolist()
    return {member.name: (count, member.numel) for member, count in zip(pool.members, counts, strict=True)}


def _apply_to(begin: int, stored: Shard, ranking: Ranking, cut: Cut) -> int | Tensor:
    if cut.key == 0:  # as many as were to go, or more, are zero already
        return stored.data.numel() - count_nonzero(stored.data)
    zeros: int | Tensor = 0
    for entries, ranked, position in ranked_blocks(stored.data, stored.start, ranking):
        zeros = zeros + apply_cut_(entries, ranked, begin + position, cut)
    return zeros


Counts = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Groups:
    """How one weight falls into groups.

    Attributes:
        num_remove: M - N, how many entries of each group go.
        size: M.
        stride: distance in flat order between neighbours along the input.
        inputs: neighbours in a slab.
        left: (K,) those of them that form groups, K a multiple of M; None for all.
    """

    num_remove: int
    size: int
    stride: int
    inputs: int
    left: Tensor | None = None

    @property
    def slab(self) -> int:
        """Consecutive entries that hold whole groups."""
        return self.inputs * self.stride

    def gone(self, slab_keys: Tensor) -> Tensor:
        """(n,) bool, which entries of whole slabs go, from their keys."""
        lines = slab_keys.view(-1, self.inputs, self.stride)
        if self.left is None:
            return lowest_in_groups(lines, self.num_remove).reshape(-1)
        left = self.left.to(lines.device)
        chosen = lowest_in_groups(lines[:, left].view(-1, self.size, self.stride), self.num_remove)
        found = torch.zeros(lines.shape, dtype=torch.bool, device=lines.device)
        found[:, left] = chosen.reshape(len(lines), -1, self.stride)
        return found.view(-1)


def check_divisible(pools: Sequence[WeightPool], m: int, removed: Mapping[str, Tensor]) -> None:
    """Refuse weights whose inputs no groups of M divide. Local.

    Args:
        pools: the weights.
        m: M.
        removed: what `removed_inputs` found.

    Raises:
        ConfigError: naming them.
    """
    wrong = {}
    for member in (member for pool in pools for member in pool.members):
        gone = int(removed[member.name].sum()) if member.name in removed else 0
        if (member.num_inputs - gone) % m:
            wrong[member.name] = f"{member.num_inputs - gone} inputs" + (" left" if gone else "")
    if wrong:
        name, inputs = next(iter(wrong.items()))
        raise ConfigError(
            f"{name} has {inputs}, which groups of {m} do not divide (and {len(wrong) - 1} more "
            "matrices); choose another M, or leave them out with PruneConfig.modules"
        )


def remove_n_of_m(
    pools: Sequence[WeightPool],
    rankings: dict[str, Ranking],
    pattern: tuple[int, int],
    partition: Partition,
    removed: Mapping[str, Tensor],
) -> Counts:
    """Collective. Zero M - N entries of each group, in place; zeros and entries of each matrix.

    Peak extra memory per rank: as of `_remove`.

    Args:
        pools: the weights.
        rankings: how each is scored.
        pattern: N and M.
        partition: the ranks.
        removed: what `removed_inputs` found.
    """
    members = [member for pool in pools for member in pool.members]
    groups = {member.name: _groups(member, pattern, removed.get(member.name)) for member in members}
    return _remove(members, groups, rankings, partition)


def remove_in_rows(pools: Sequence[WeightPool], rankings: dict[str, Ranking], partition: Partition) -> Counts:
    """Collective. Zero the same number of entries in each output of a weight, round(sparsity * I), in place.

    Peak extra memory per rank: as of `_remove`; for a Conv1D the keys of the whole weight.

    Args:
        pools: the weights.
        rankings: how each is scored.
        partition: the ranks.

    Returns:
        Zeros and entries of each matrix.
    """
    members, groups = [], {}
    for pool in pools:
        for member in pool.members:
            members.append(member)
            num_remove = min(round(pool.sparsity * member.num_inputs), member.num_inputs - 1)
            groups[member.name] = Groups(num_remove, member.num_inputs, _stride(member), member.num_inputs)
    return _remove(members, groups, rankings, partition)


def _remove(
    members: Sequence[Matrix], groups: dict[str, Groups], rankings: dict[str, Ranking], partition: Partition
) -> Counts:
    """Collective. Zero what goes of each group, in place; zeros and entries of each matrix.

    Peak extra memory per rank: a few blocks, and the keys of one weight's cut slabs; for a Conv1D whose
    groups removed inputs have shifted, the keys of the whole weight.
    """
    cuts = _cut_slabs(members, groups, partition)
    zeros = torch.zeros(len(members), dtype=torch.int64)
    for index, member in enumerate(members):
        how, ranking = groups[member.name], rankings[member.name]
        gone = _gone_in_cut_slabs(member, how, ranking, cuts[index], partition)
        with raise_on_all_ranks(partition), member.edit(partition) as stretches:
            for stored in stretches:
                _zero_groups(stored, how, ranking, gone)
            shard = stretches[0].data
            zeros[index] = shard.numel() - count_nonzero(shard)
    counts = partition.sum_over_shards(zeros).tolist()
    return {member.name: (count, member.numel) for member, count in zip(members, counts, strict=True)}


def _groups(member: Matrix, pattern: tuple[int, int], gone: Tensor | None) -> Groups:
    n, m = pattern
    stride = _stride(member)
    if gone is None or (len(gone) % m == 0 and torch.equal(*gone.view(-1, m).aminmax(dim=1))):
        return Groups(m - n, m, stride, m)
    return Groups(m - n, m, stride, len(gone), (~gone).nonzero().flatten())


def _stride(member: Matrix) -> int:
    return member.shape[1] if member.transposed else 1


def _cut_slabs(members: Sequence[Matrix], groups: dict[str, Groups], partition: Partition) -> list[list[int]]:
    """Collective. The slabs of each weight that an edge of a shard cuts, on any rank."""
    edges = torch.zeros(len(members), partition.world_size, 2, dtype=torch.int64)
    for index, member in enumerate(members):
        shard = member.shard(partition)
        edges[index, partition.rank] = torch.tensor([shard.start, shard.start + shard.data.numel()])
    found = partition.sum_over_shards(edges).flatten(1).tolist()
    slabs = [groups[member.name].slab for member in members]
    return [
        sorted({edge // slab for edge in row if edge % slab}) for row, slab in zip(found, slabs, strict=True)
    ]


def _gone_in_cut_slabs(
    member: Matrix, how: Groups, ranking: Ranking, cut: list[int], partition: Partition
) -> dict[int, Tensor]:
    """Collective. What goes of each cut slab, from keys that every rank adds its part to."""
    if not cut:
        return {}
    with raise_on_all_ranks(partition):
        everyone = torch.zeros(len(cut), how.slab, dtype=torch.int32, device=partition.device)
        shard = member.shard(partition)
        for index, slab in enumerate(cut):
            for keys, position in key_blocks(*_inside(shard, slab * how.slab, how.slab), ranking):
                first = position - slab * how.slab
                everyone[index, first : first + keys.numel()] = keys.to(everyone.device)
    whole = partition.sum_over_shards(everyone)
    return {slab: how.gone(whole[index]) for index, slab in enumerate(cut)}


def _zero_groups(stored: Shard, how: Groups, ranking: Ranking, gone: dict[int, Tensor]) -> None:
    """Write the zeros to one stored stretch. Local."""
    start, stop = stored.start, stored.start + stored.data.numel()
    first, last = -(-start // how.slab) * how.slab, stop // how.slab * how.slab
    if first < last:
        middle = stored.data[first - start : last - start]
        for keys, position in whole_slabs(key_blocks(middle, first, ranking), how.slab):
            middle[position - first : position - first + keys.numel()].masked_fill_(how.gone(keys), 0)
    for slab in {start // how.slab, stop // how.slab} & set(gone):
        part, position = _inside(stored, slab * how.slab, how.slab)
        skip = position - slab * how.slab
        part.masked_fill_(gone[slab][skip : skip + part.numel()].to(part.device), 0)


def _inside(stored: Shard, position: int, length: int) -> tuple[Tensor, int]:
    """The part of a stretch within `length` entries from `position`, and where it begins."""
    first = max(stored.start, position)
    last = max(first, min(stored.start + stored.data.numel(), position + length))
    return stored.data[first - stored.start : last - stored.start], first
