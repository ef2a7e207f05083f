"""Short texts that tell contents apart, from shards: of a model's state, and of a frozen weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.bits import count_nonzero, position_sum
from dsee_scale.partition import Partition
from dsee_scale.partition.port import Shard
from dsee_scale.passes.pools import block_linears

LAST = 4
"""Matrices whose content is part of a model's fingerprint."""
MOST_SAMPLED = 256
"""Weights of which samples are taken, spread over the model."""
SAMPLED, STRIDE = 8, 4099
"""Entries of each, and what lies between them; near the start, so that appended rows change nothing."""


def fingerprint(module: nn.Module, partition: Partition) -> str:
    """Collective. SHA-256 over names, shapes, the record of prunings, the number of zeros, and what is trained.

    Of the frozen weights the base model's name, one block's matrices and a few entries of each one stand for all. The
    same on any number of ranks.
    """
    params, pruned = dict(module.named_parameters()), model_state(module).pruned
    adapters = {id(layer.dsee_flat) for layer in adapted_layers(module).values()}
    digests, frozen = [], {}
    for name, param in params.items():
        shard = partition.shard(param)
        if id(param) in adapters or (adapters and param.requires_grad):
            digests.append(position_sum(shard.data, shard.start))
            continue
        frozen[name] = param
        if name in pruned:
            digests.append(count_nonzero(shard.data))
    digests = partition.sum_over_shards(torch.tensor(digests, dtype=torch.int64)).tolist()
    shapes = {name: list(partition.shape(param)) for name, param in params.items()}
    last = dict(list(block_linears(module).items())[-LAST:])
    weights = {name: layer.weight for name, layer in last.items()}
    known = contents(weights, partition)  # type: ignore[arg-type]
    base = str(getattr(getattr(module, "config", None), "_name_or_path", ""))
    # As `rounded_sum`: the dtype that a weight is loaded in changes nothing.
    few = {
        name: (torch.tensor(row).bfloat16() + 0.0).tolist()
        for name, row in _samples(frozen, partition).items()
    }
    text = json.dumps([base, shapes, known, few, pruned, digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def contents(weights: Mapping[str, nn.Parameter], partition: Partition) -> dict[str, str]:
    """Collective. Checksums of whole frozen weights, 16 hexadecimal digits each; the same on any number of ranks."""
    sums = torch.zeros(len(weights), dtype=torch.int64)
    for index, param in enumerate(weights.values()):
        shard = partition.shard(param)
        sums[index] = rounded_sum(shard.data, shard.start)
    return {
        name: as_text(total)
        for name, total in zip(weights, partition.sum_over_shards(sums).tolist(), strict=True)
    }


def rounded_sum(stretch: Tensor, start: int) -> int:
    """`position_sum` at bfloat16's precision: loading a weight in float32 or in bfloat16 changes nothing. Local."""
    # Adding zero makes -0.0 a plain 0.0: a mask applied by multiplication leaves the sign.
    return position_sum(stretch.detach().to(torch.bfloat16) + 0.0, start)


def as_text(total: int) -> str:
    """16 hexadecimal digits."""
    return f"{total % 2**64:016x}"


def samples(weights: Mapping[str, nn.Parameter], partition: Partition) -> dict[str, list[float]]:
    """Collective. A few entries of weights, by which another base of the same shapes is told; see `is_other_sample`.

    Of quantised weights there are none, which are other numbers for each kind of codes.
    """
    known = [name for name, param in weights.items() if _has_numbers(param, partition)]
    chosen = {name: weights[name] for name in known[:: -(-len(known) // MOST_SAMPLED) or 1]}
    return {name: [float(f"{x:.6g}") for x in row] for name, row in _samples(chosen, partition).items()}


def _samples(weights: Mapping[str, nn.Parameter], partition: Partition) -> dict[str, list[float]]:
    """Collective. Entries of all these weights that hold numbers."""
    chosen = {name: param for name, param in weights.items() if _has_numbers(param, partition)}
    found = torch.zeros(len(chosen), SAMPLED)
    here: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for row, param in enumerate(chosen.values()):
        columns, values = _sample(partition.shard(param), partition.shape(param).numel())
        if columns:
            places = torch.tensor(columns) + row * SAMPLED
            here.setdefault(values.device, []).append((places, values))
    for pairs in here.values():  # one copy to the host for each device, not for each weight
        places, values = (torch.cat(each) for each in zip(*pairs, strict=True))
        found.view(-1)[places] = _finite(values)
    return dict(zip(chosen, partition.sum_over_shards(found).tolist(), strict=True))


def _has_numbers(param: nn.Parameter, partition: Partition) -> bool:
    readable = param.is_floating_point() and param.is_contiguous() and param.device.type != "meta"
    return readable and id(param) not in partition.codecs


def sample(weight: Tensor) -> list[float]:
    """Local. The sample of a whole weight, 0 for what is no number; as long as it is, at most SAMPLED numbers."""
    return _finite(_sample(Shard(weight.reshape(-1), 0), weight.numel())[1]).tolist()


def _sample(shard: Shard, numel: int) -> tuple[list[int], Tensor]:
    """Local. Which numbers of a weight's sample lie in this shard, and these, (K,) float32 on its device."""
    step = max(1, min(STRIDE, numel // SAMPLED))
    places = {k: k * step - shard.start for k in range(min(SAMPLED, numel))}
    places = {k: place for k, place in places.items() if 0 <= place < shard.data.numel()}
    return list(places), shard.data.detach()[list(places.values())].float()


def _finite(values: Tensor) -> Tensor:
    return values.cpu().nan_to_num(0.0, 0.0, 0.0)


def is_other_sample(saved: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two samples are of different weights: more apart than 16-bit dtypes are.

    What is zero in `saved` says nothing: a mask may have put it there.
    """
    pairs = ((a, b) for a, b in zip(saved, found, strict=True) if a)
    return any(abs(a - b) > 2**-7 * max(abs(a), abs(b)) + 2**-23 for a, b in pairs)
