"""Remove whole attention heads or feed-forward neurons: zeroed in place here, cut out at export.

A removed unit is zero on both sides: its outputs in the matrices before (q, k, v or up, gate; with biases, B
and the values of S2) and its inputs in the matrix after (o or down; with A and the values of S2). Then every
gradient of what was zeroed is a product with one of these zeros, exactly zero itself; and since the
optimizer's moments of these entries are cleared, no step of the retune moves them. No mask is multiplied in
forward or backward, so nothing has to be put back after a restart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsee_scale.adapters.removed_units import record_removed, removed_units
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import Kind, Part, UnitLayer, find_units
from dsee_scale.algorithms.patterns import (
    lowest_units,
    lowest_units_overall,
)
from dsee_scale.config import SCORES, PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.passes.pools import WeightPool
from dsee_scale.pruning.unit_scores import covered_outputs
from dsee_scale.pruning.zero_lines import Lines, check_reachable, zero_lines

_FIRST = -(2**62)
"""Score of a unit that is gone already: it goes first, so that removing more is cumulative."""
ALIGNMENT = 16
"""Bytes."""


@dataclass(frozen=True)
class UnitPlan:
    """What one pruning of units does, known from names, shapes and settings alone.

    Attributes:
        layers: the heads or neurons of every block.
        gone: what earlier prunings removed of each layer, (U,) bool.
        budget: units that go of each layer; with a floor one number, for all layers together.
        floor: units that stay in each layer at least, where the budget is for all together.
        pool: all their matrices, for the checks that every pruning makes.
    """

    layers: list[UnitLayer]
    gone: list[Tensor]
    budget: list[int]
    floor: int | None
    pool: WeightPool


@dataclass(frozen=True, eq=False)
class ChosenUnits:
    """What goes of one layer.

    Attributes:
        layer: its units.
        before: (U,) bool, what earlier prunings removed.
        gone: (U,) bool, what is gone afterwards, that included.
    """

    layer: UnitLayer
    before: Tensor
    gone: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """Heads, neurons or experts that are gone, and all."""
        return int(self.gone.sum()) * self.layer.unit_size, self.layer.size


def plan_units(
    module: nn.Module, config: PruneConfig, shape_of: Callable[[nn.Parameter], torch.Size]
) -> UnitPlan:
    """Check a pruning of heads or neurons against the architecture. Local.

    Raises:
        TargetError: an architecture without a description, or a score without an adapter to read.
        ConfigError: counts that break key/value groups, or leave a layer with nothing.
    """
    kind: Kind = config.pattern  # type: ignore[assignment]
    layers = find_units(module, kind, shape_of)
    members = tuple(part.matrix for layer in layers for part in layer.parts)
    for layer in layers:
        _reject_unscored(layer, config)
        _reject_shared_a(layer)
        _reject_shifted_groups(module, layer)
        _reject_unequal(layer, config)
        _reject_unaligned(layer, config)
    overall = config.num_per_layer is None and config.scope == "global"
    gone = [removed_units(module, layer) for layer in layers]
    return UnitPlan(
        layers=layers,
        gone=gone,
        budget=[_overall_budget(layers, gone, config)]
        if overall
        else [_layer_budget(x, config) for x in layers],
        floor=_floor(layers[0], config) if overall else None,
        pool=WeightPool(kind, config.sparsity or 0.0, members),
    )


def check_units_reachable(model: nn.Module, plan: UnitPlan) -> None:
    """Refuse units with optimizer state that could not be zeroed; see `check_reachable`. Local."""
    check_reachable(model, [p for layer in plan.layers for part in layer.parts for p in _touched(part)])


def choose_units(plan: UnitPlan, scores: list[Tensor]) -> list[ChosenUnits]:
    """What goes of each layer, given the (U,) int64 scores of each: the lowest. Local."""
    ranked = [found.masked_fill(gone, _FIRST) for found, gone in zip(scores, plan.gone, strict=True)]
    if plan.floor is not None:
        chosen = lowest_units_overall(ranked, plan.gone, plan.budget[0], plan.floor)
    else:
        chosen = [
            torch.cat([lowest_units(run, count // layer.groups) for run in found.chunk(layer.groups)])
            for layer, found, count in zip(plan.layers, ranked, plan.budget, strict=True)
        ]
    return [
        ChosenUnits(layer, gone, units | gone)
        for layer, gone, units in zip(plan.layers, plan.gone, chosen, strict=True)
    ]


@torch.no_grad()
def zero_units(model: nn.Module, chosen: Sequence[ChosenUnits], partition: Partition) -> None:
    """Collective. Zero these units' rows, columns, biases and shares of the adapters, and record them as gone.

    Peak extra memory per rank: a few blocks, and one int64 for each row or column of one matrix.
    """
    with raise_on_all_ranks(partition):
        zero_lines(model, partition, [one for each in chosen for one in _lines(each.layer, each.gone)])
        for each in chosen:
            record_removed(unwrap(model), each.layer, each.gone)


def _touched(part: Part) -> list[nn.Parameter]:
    bias = part.matrix.bias if part.has_unit_bias else None
    flat = part.matrix.adapter.dsee_flat if part.matrix.adapted else None
    return [param for param in (part.matrix.param, bias, flat) if param is not None]


def _lines(layer: UnitLayer, units: Tensor) -> Iterator[Lines]:
    """What has to be zero where units are gone."""
    for part in layer.parts:
        gone, matrix = units[part.unit_of], part.matrix
        yield Lines(matrix.param, part.axis, gone, matrix.shape, matrix.offset)
        if part.has_unit_bias:
            yield Lines(matrix.bias, 1, gone, (1, len(gone)), (matrix.expert or 0) * len(gone))  # type: ignore[arg-type]
        if matrix.adapted and layer.kind == "experts":
            yield from _whole_expert_lines(part, gone)
        elif matrix.adapted and matrix.expert is not None:
            yield from _expert_lines(part, gone, matrix.expert)
        elif matrix.adapted:
            yield from _adapter_lines(part, gone)


def _whole_expert_lines(part: Part, gone: Tensor) -> Iterator[Lines]:
    """Of the updates of whole experts: their B and values, which no other expert has."""
    layer = part.matrix.adapter
    a, b, values = map(math.prod, layer.dsee_spec.shapes)
    yield Lines(layer.dsee_flat, 0, gone, (len(gone), b // len(gone)), a)
    if values:
        yield Lines(layer.dsee_flat, 0, gone, (len(gone), values // len(gone)), a + b)


def _expert_lines(part: Part, gone: Tensor, expert: int) -> Iterator[Lines]:
    """Of one expert's update: stored rows of its matrix are rows of its B, stored columns are columns of its A."""
    layer = part.matrix.adapter
    spec, (rows, columns) = layer.dsee_spec, part.matrix.shape
    a, b, _ = map(math.prod, spec.shapes)
    own = slice(expert * spec.num_sparse, (expert + 1) * spec.num_sparse)
    if part.axis == 0:
        yield Lines(layer.dsee_flat, 0, gone, (rows, spec.rank), a + expert * rows * spec.rank)
        at = layer.dsee_rows[own] - expert * rows
    else:
        yield Lines(layer.dsee_flat, 1, gone, (spec.rank, columns), expert * spec.rank * columns)
        at = layer.dsee_cols[own]
    if spec.num_sparse:
        yield Lines(layer.dsee_flat, 1, gone[at.long().cpu()], (1, spec.num_sparse), a + b + own.start)


def _adapter_lines(part: Part, gone: Tensor) -> Iterator[Lines]:
    layer = part.module
    flat: nn.Parameter = layer.dsee_flat  # type: ignore[assignment]
    a, b, (num_values,) = layer.dsee_spec.shapes  # type: ignore[union-attr, misc]
    if part.side == "outputs":
        yield Lines(flat, 0, gone[covered_outputs(part)], b, math.prod(a))
        at = layer.dsee_rows
    else:
        yield Lines(flat, 1, gone, a)
        at = layer.dsee_cols
    if not num_values:
        return
    gone_values = gone[at.long().cpu()]  # type: ignore[operator]
    yield Lines(flat, 1, gone_values, (1, num_values), math.prod(a) + math.prod(b))


def _reject_shared_a(layer: UnitLayer) -> None:
    for part in layer.parts if layer.kind == "neurons" else ():
        if part.matrix.expert is not None and part.matrix.adapted and part.matrix.adapter.dsee_spec.shared_a:
            raise ConfigError(
                f"{part.name} shares the A of its update with the layer's other experts (shared_expert_a), so its "
                "neurons cannot be removed; choose pattern 'unstructured' or N:M, or inject without shared_expert_a"
            )


def _reject_unscored(layer: UnitLayer, config: PruneConfig) -> None:
    reads = SCORES[config.score]
    if reads.update and not reads.weight and not any(part.matrix.adapted for part in layer.parts):
        names = ", ".join(part.name.rsplit(".", 1)[-1] for part in layer.parts)
        raise TargetError(
            f"score {config.score!r} reads the update alone, and no matrix of {layer.name}'s {layer.kind} is "
            f"adapted ({names}); adapt one of them, or choose score='W' or 'WABS'"
        )


def _reject_shifted_groups(module: nn.Module, layer: UnitLayer) -> None:
    """Cutting inputs out of an N:M matrix would put other neighbours into its groups, and break the pattern."""
    for part in (part for part in layer.parts if part.side == "inputs"):
        pattern = str(model_state(module).pruned.get(part.matrix.param_name, {}).get("pattern"))
        groups = PruneConfig(pattern=pattern).n_of_m if ":" in pattern else None
        if groups and (layer.unit_size * layer.head_size) % groups[1]:
            raise ConfigError(
                f"{part.name} is {pattern}, and without some of its inputs it would not be; remove {layer.kind} "
                f"first and make it {pattern} after that (in one call: prune(model, [first, second])), or leave "
                "it out of the N:M pruning with `modules`"
            )


def _layer_budget(layer: UnitLayer, config: PruneConfig) -> int:
    """Units that go of one layer."""
    run = layer.num_units // layer.groups
    if config.num_per_layer is not None:
        each = (
            layer.groups if layer.kind == "neurons" else 1
        )  # of experts the neurons of each one are counted
        num_units, rest = divmod(config.num_per_layer * each, layer.unit_size)
        if rest:
            raise ConfigError(
                f"num_per_layer {config.num_per_layer} breaks the key/value groups of {layer.name}: "
                f"{layer.unit_size} heads share one; expected a multiple of {layer.unit_size}"
            )
    else:
        num_units = _rounded(config, run, layer) * layer.groups
    if num_units % layer.groups:
        raise ConfigError(
            f"{layer.name} chooses among {layer.groups} groups of {run} experts, which must stay equal, and "
            f"{num_units} are to go; expected a multiple of {layer.groups}"
        )
    least = _floor(layer, config)
    if layer.num_units - num_units < least * (1 if layer.kind == "experts" else layer.groups):
        raise ConfigError(
            f"this removes {num_units * layer.unit_size} of {layer.size} {layer.kind} of {layer.name} (one unit is "
            f"{layer.unit_size}); at least {_reason(layer, least)} must stay: remove fewer"
        )
    return num_units


def _reason(layer: UnitLayer, least: int) -> str:
    if layer.kind == "experts" and layer.in_group * layer.groups > layer.top:
        return (
            f"{least}, {layer.in_group} in each of the {layer.groups} groups that its router chooses among,"
        )
    if layer.kind == "experts":
        return f"{least}, one more than the {layer.top} that each token goes to,"
    return "one unit"


def _overall_budget(layers: list[UnitLayer], gone: list[Tensor], config: PruneConfig) -> int:
    """Units that go of all layers together."""
    total = sum(layer.num_units for layer in layers)
    num_units = _rounded(config, total, layers[0])
    most = sum(
        max(sum(already.tolist()), layer.num_units - _floor(layer, config))
        for layer, already in zip(layers, gone, strict=True)
    )
    if num_units > most:
        raise ConfigError(
            f"sparsity {config.sparsity} removes {num_units} of {total} units, but with at least "
            f"{max(config.min_per_layer, layers[0].top + 1)} {layers[0].kind} in every layer only {most} can go; "
            "lower sparsity or min_per_layer"
        )
    return num_units


def _rounded(config: PruneConfig, num_units: int, layer: UnitLayer) -> int:
    """Units that go; of a schedule's first cuts that may be none, but not of all of them."""
    sparsity = config.final_sparsity or config.sparsity or 0.0
    if sparsity and not round(sparsity * num_units):
        raise ConfigError(
            f"sparsity {sparsity} of {num_units} units ({layer.unit_size} {layer.kind} each) rounds to none; "
            "raise it, or set num_per_layer"
        )
    return round((config.sparsity or 0.0) * num_units)


def _floor(layer: UnitLayer, config: PruneConfig) -> int:
    """Units that stay; of experts one more than a token goes to, else there would be nothing to choose."""
    return max(-(-config.min_per_layer // layer.unit_size), layer.top + 1, layer.in_group * layer.groups)


def _reject_unequal(layer: UnitLayer, config: PruneConfig) -> None:
    """One tensor holds the matrices of all experts, so they must stay alike; so must groups of experts."""
    if layer.groups > 1 and config.num_per_layer is None and config.scope == "global":
        what = "experts" if layer.kind == "neurons" else "groups of experts"
        raise ConfigError(
            f"scope 'global' would leave the {what} of {layer.name} with unequal numbers of {layer.kind}, which no "
            "tensor can hold; set scope='matrix', or num_per_layer"
        )


def _reject_unaligned(layer: UnitLayer, config: PruneConfig) -> None:
    """Grouped products, by which stock transformers runs experts, need rows of a multiple of 16 bytes."""
    matrix = layer.parts[0].matrix
    if layer.kind != "neurons" or matrix.expert is None:
        return
    end = config
    if config.final_sparsity is not None:
        end = dataclasses.replace(config, sparsity=config.final_sparsity)
    run, multiple = layer.num_units // layer.groups, ALIGNMENT // matrix.param.element_size()
    left = run - _layer_budget(layer, end) // layer.groups
    if run % multiple == 0 and left % multiple:
        near = {run - left // multiple * multiple, run - -(-left // multiple) * multiple} - {0, run}
        raise ConfigError(
            f"this leaves {left} neurons in each expert of {layer.name}, with which stock transformers cannot run "
            f"the exported model: its grouped products need rows of a multiple of {ALIGNMENT} bytes. Leave a multiple "
            f"of {multiple}" + "".join(f", num_per_layer={number}" for number in sorted(near))
        )
