"""Which heads, neurons and experts matter: a score for each, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsee_scale.adapters.units import Part, UnitLayer
from dsee_scale.algorithms.patterns import (
    EXPONENTS,
    add_along_axis,
    fixed_point,
    fixed_point_shift,
    largest_exponent,
    score_blocks,
    unit_sums,
)
from dsee_scale.algorithms.score import Ranking, random_scores
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import TargetError
from dsee_scale.partition import Partition
from dsee_scale.passes.calibrate import Statistics

RECIPROCAL = ("NAB", "NABS")


def unit_scores(
    layers: Sequence[UnitLayer], rankings: dict[str, Ranking], partition: Partition
) -> list[Tensor]:
    """Collective. (U,) int64 of each layer, the same on any number of ranks."""
    how = rankings[layers[0].parts[0].name]
    if how.mode == "random":
        return random_unit_scores(layers, how.seed)
    exponents = torch.zeros(EXPONENTS, dtype=torch.int64)
    with raise_on_all_ranks(partition):
        try:
            for part in (part for layer in layers for part, _ in _scored(layer, how.mode)):
                exponents += largest_exponent(_score_blocks(part, rankings, partition))
        except ValueError as error:
            raise TargetError(str(error)) from error
    entries = max(sum(p.shape[0] * p.shape[1] for p in x.parts) // x.num_units for x in layers)
    shift = fixed_point_shift(partition.sum_over_shards(exponents), entries)
    with raise_on_all_ranks(partition):
        sums = [_layer_sums(layer, rankings, shift, partition) for layer in layers]
    summed = partition.sum_over_shards(torch.cat(sums))
    signed = -summed if how.mode in RECIPROCAL else summed
    return list(signed.split([layer.num_units for layer in layers]))


def random_unit_scores(layers: Sequence[UnitLayer], seed: int) -> list[Tensor]:
    """(U,) int64 of each layer, that depend on the seed and its name alone."""
    return [
        (random_scores(seed, f"{layer.name}.{layer.kind}", 0, layer.num_units) * 2**24).long()
        for layer in layers
    ]


def _layer_sums(layer: UnitLayer, rankings: dict[str, Ranking], shift: int, partition: Partition) -> Tensor:
    """(U,) int64, this rank's part of the units' scores in multiples of 2**-shift. Local."""
    total = torch.zeros(layer.num_units, dtype=torch.int64)
    for part, unit_of in _scored(layer, rankings[layer.parts[0].name].mode):
        device = part.matrix.shard(partition).data.device
        sums = torch.zeros(len(unit_of), dtype=torch.int64, device=device)
        for found, position in _score_blocks(part, rankings, partition):
            add_along_axis(fixed_point(found, shift), position, part.matrix.shape[1], part.axis, sums)
        total += unit_sums(sums.cpu(), unit_of, layer.num_units)
    return total


def _score_blocks(
    part: Part, rankings: dict[str, Ranking], partition: Partition
) -> Iterator[tuple[Tensor, int]]:
    shard = part.matrix.shard(partition)
    blocks = score_blocks(shard.data, shard.start, rankings[part.name])
    if rankings[part.name].mode == "wanda":  # a unit's contribution is a sum over orthogonal parts, about
        return ((found.square_(), position) for found, position in blocks)
    return blocks


def _scored(layer: UnitLayer, mode: str) -> list[tuple[Part, Tensor]]:
    """The matrices whose entries count, and the unit of each of their rows or columns, -1 for none.

    Mode W counts all. Mode wanda counts what units add to the block's output: in the matrix after the activation or
    the attention, |column| times the norm of its input. Modes that read the update count the adapted slices of
    adapted matrices: with q and v adapted those are the rows that the paper's code adds up. WAB and WABS fall back to
    all where none is.
    """
    if mode == "wanda":
        return [(part, part.unit_of) for part in layer.parts if part.side == "inputs"]
    adapted = [part for part in layer.parts if part.matrix.adapted]
    if mode == "W" or not adapted:
        return [(part, part.unit_of) for part in layer.parts]
    return [(part, _within_slices(part)) for part in adapted]


def _within_slices(part: Part) -> Tensor:
    if part.side == "inputs" or part.matrix.expert is not None:
        return part.unit_of
    covered = covered_outputs(part)
    return torch.full_like(part.unit_of, -1).index_copy_(0, covered, part.unit_of[covered])


def covered_outputs(part: Part) -> Tensor:
    """Output indices that the rows of B stand for, in their order."""
    slices: Sequence[tuple[int, int]] = part.module.dsee_spec.slices  # type: ignore[union-attr, assignment]
    return torch.cat([torch.arange(start, stop) for start, stop in slices])


def expert_scores(
    layers: Sequence[UnitLayer], config: PruneConfig, statistics: Statistics | None
) -> list[Tensor]:
    """(E,) int64 of each layer, the least important first. Local, the same on every rank.

    reap is Lasby et al., arXiv 2510.13999: the mean over the tokens that go to an expert of its gate value times the
    norm of its output. frequency is how many tokens these are. An expert that no token reached scores 0 in both.
    """
    if config.score == "random" or statistics is None:
        return random_unit_scores(layers, config.seed)
    found = []
    for layer in layers:
        up = layer.parts[0].matrix
        sums = torch.tensor(statistics.gated[up.owner], dtype=torch.float64)
        names = [f"{up.owner}.{expert}.{up.attribute}" for expert in range(layer.num_units)]
        tokens = torch.tensor([statistics.tokens[name] for name in names])
        means = sums / tokens.clamp(min=1)
        # The bits of a non-negative float order as integers.
        found.append(tokens if config.score == "frequency" else means.view(torch.int64))
    return found
