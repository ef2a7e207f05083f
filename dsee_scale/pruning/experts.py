"""Which experts matter: scores of whole experts from what calibration saw of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsee_scale.adapters.units import UnitLayer
from dsee_scale.config import PruneConfig
from dsee_scale.passes.calibrate import Statistics
from dsee_scale.pruning.units import random_unit_scores


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
