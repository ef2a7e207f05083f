"""How much of each matrix goes, and what its outputs and its inputs' tokens count, by how the loss depends on them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.algorithms.score import Ranking, ranked_blocks
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import log_rank0, raise_on_all_ranks
from dsee_scale.partition import Partition
from dsee_scale.passes.batches import Batches
from dsee_scale.passes.calibrate import Statistics
from dsee_scale.passes.pools import WeightPool
from dsee_scale.passes.sensitivity import has_loss, output_gradients
from dsee_scale.pruning.common_threshold import NUM_BINS, count_keys_, deal_removals
from dsee_scale.pruning.rankings import find_rankings

logger = logging.getLogger(__name__)

SPREAD = 1e3
"""How far an output's mean squared gradient may count as being from its matrix's mean, either way."""

TOKEN_SPREAD = 30.0
"""How far the square root of a token's may, which is what counts: more, and a Gram matrix would be a few tokens'."""

TEMPERS = (1.0, 0.5, 0.25, 0.0)
"""Powers to which the tokens' weights may be taken, the strongest first."""

EFFECTIVE = 0.5
"""What share of the tokens the weights must leave to count, by Kish's effective sample size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """What the loss says about each matrix.

    Attributes:
        sparsity: name -> fraction of its entries that goes (of those whose inputs are still there).
        outputs: name -> (O,) float32, what an error in each output counts.
        tokens: leader of an input -> for each batch that counts, (T,) float32, what an error at each token counts.

    All are empty where the loss has no say.
    """

    sparsity: dict[str, float] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)


def find_shares(
    model: nn.Module,
    pools: Sequence[WeightPool],
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Batches,
    leaders: Mapping[str, str],
    statistics: Statistics,
    removed: Mapping[str, Tensor],
    config: PruneConfig,
    partition: Partition,
    *,
    progress: bool | None = None,
) -> Shares:
    """Collective. Under scope `global`, deal each pool's removals to its linear layers; experts lose the pool's share.

    One threshold goes over |W + D| * norm of the input * weight of the output. Under N:M every matrix loses the same,
    and the loss has its say on tokens alone. Without a loss every matrix loses its pool's share, with a warning.

    Args:
        model: what `prune` was given.
        pools: the weights.
        blocks: the repeated blocks, in order.
        batches: this rank's model inputs.
        leaders: by matrix, the first one that reads the same input.
        statistics: of the linear layers' inputs.
        removed: inputs that went with heads or neurons, by matrix.
        config: the pruning.
        partition: port to the weights.
        progress: see `prune`.
    """
    pools = _without_experts(pools)
    if config.scope != "global" or not pools:
        return Shares()
    batches = list(batches)
    if not has_loss(model, batches, partition):
        log_rank0(
            logger,
            "the calibration batches have no labels that count (all are -100 or missing; a decoder needs none), so "
            "every matrix loses the same share and every token counts alike; with labels, more would go elsewhere",
        )
        return Shares()
    members = [member for pool in pools for member in pool.members]
    layers = {member.name: member.module for member in members}
    sizes = {member.name: member.outputs_by_inputs[0] for member in members}
    found = output_gradients(model, layers, sizes, blocks, batches, partition, progress=progress)
    with raise_on_all_ranks(partition):
        tokens = _token_weights(found.tokens, {member.name: leaders[member.name] for member in members})
        outputs = {name: _output_weights(each) for name, each in found.outputs.items()}
    tokens = _tempered(tokens, sorted({leaders[member.name] for member in members}), partition)
    if config.n_of_m:
        return Shares(tokens=tokens)
    rankings = find_rankings(pools, config, partition, statistics)
    sparsity = _dealt(pools, rankings, found.outputs, outputs, removed, partition)
    relative = {name: each / each.square().mean().sqrt() for name, each in outputs.items()}
    return Shares(sparsity, relative, tokens)


def _without_experts(pools: Sequence[WeightPool]) -> list[WeightPool]:
    """The pools' linear layers; pools of nothing else are left out."""
    linear = [tuple(m for m in pool.members if m.expert is None) for pool in pools]
    return [
        dataclasses.replace(pool, members=members)
        for pool, members in zip(pools, linear, strict=True)
        if members
    ]


def _dealt(
    pools: Sequence[WeightPool],
    rankings: dict[str, Ranking],
    gradients: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    removed: Mapping[str, Tensor],
    partition: Partition,
) -> dict[str, float]:
    """Collective. The share of each matrix that goes; the pool's, where no token or no gradient tells one."""
    sparsity: dict[str, float] = {}
    for pool in pools:
        told = [
            m for m in pool.members if rankings[m.name].norms is not None and bool(gradients[m.name].any())
        ]
        sparsity |= {member.name: pool.sparsity for member in pool.members}
        if not told:
            continue
        histograms = _histograms(told, rankings, outputs, removed, partition)
        total = int(histograms.sum())
        dealt = deal_removals(histograms, min(round(pool.sparsity * total), total - 1))
        for member, histogram, count in zip(told, histograms, dealt, strict=True):
            sparsity[member.name] = count / max(1, int(histogram.sum()))
    return sparsity


def _histograms(
    members: Sequence[Matrix],
    rankings: Mapping[str, Ranking],
    outputs: Mapping[str, Tensor],
    removed: Mapping[str, Tensor],
    partition: Partition,
) -> Tensor:
    """Collective. (members, NUM_BINS): how the scores of each matrix are spread, without the inputs that are gone."""
    with raise_on_all_ranks(partition):
        histograms = torch.zeros(len(members), NUM_BINS, dtype=torch.int64, device=partition.device)
        for histogram, member in zip(histograms, members, strict=True):
            ranking = dataclasses.replace(rankings[member.name], outputs=outputs[member.name])
            shard = member.shard(partition)
            for _, keys, _ in ranked_blocks(shard.data, shard.start, ranking):
                count_keys_(histogram, keys)
    histograms = partition.sum_over_shards(histograms)
    for histogram, member in zip(histograms, members, strict=True):
        if member.name in removed:
            histogram[0] -= int(removed[member.name].sum()) * member.outputs_by_inputs[0]
    return histograms


def _output_weights(squared_O: Tensor) -> Tensor:
    """Root mean squared gradients, none of them far from the matrix's mean; the same for all where there is none."""
    mean = squared_O.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return squared_O.clamp(min=float(mean) / SPREAD, max=float(mean) * SPREAD).sqrt()


def _token_weights(
    relative: Mapping[str, list[Tensor]], leaders: Mapping[str, str]
) -> dict[str, list[Tensor]]:
    """Local. By leader, the root of the mean over the matrices that share its input, where it is known of all."""
    sharing: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        sharing.setdefault(leader, []).append(name)
    return {
        leader: [
            (sum(batch) / len(names)).sqrt().clamp(1 / TOKEN_SPREAD, TOKEN_SPREAD)
            for batch in zip(*(relative[name] for name in names), strict=True)
        ]
        for leader, names in sharing.items()
        if all(name in relative for name in names)
    }


def _tempered(
    weights: Mapping[str, list[Tensor]], leaders: Sequence[str], partition: Partition
) -> dict[str, list[Tensor]]:
    """Collective. Each leader's weights to the strongest power that leaves enough tokens to fit a matrix to.

    Where the loss is asked at one token of a row, as in classification, few tokens would count otherwise.
    """
    with raise_on_all_ranks(partition):
        sums = torch.zeros(len(leaders), len(TEMPERS), 3, dtype=torch.float64)
        for row, leader in zip(sums, leaders, strict=True):
            flat = torch.cat([torch.empty(0), *weights.get(leader, [])]).double()
            for entry, power in zip(row, TEMPERS, strict=True):
                tempered = flat**power
                entry.copy_(
                    torch.stack([tempered.sum(), tempered.square().sum(), tempered.new_tensor(len(flat))])
                )
    total, squares, count = partition.sum_over_ranks(sums).unbind(-1)
    enough = (total.square() >= EFFECTIVE * squares * count).int()
    powers = dict(zip(leaders, enough.argmax(1).tolist(), strict=True))
    return {
        leader: [each ** TEMPERS[powers[leader]] for each in batches] for leader, batches in weights.items()
    }
