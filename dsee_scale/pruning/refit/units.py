"""A re-fit after whole heads or neurons: what each block's other units become so that they make up for them.

The matrix behind the units (o, or down) loses inputs; what is left of it is solved exactly for the inputs that the
block still gets. With `block_steps` the matrices before it take their steps too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.adapters.state import MASK_UPDATE, model_state
from dsee_scale.adapters.units import Part
from dsee_scale.config import UNIT_PATTERNS, PruneConfig
from dsee_scale.pruning.refit.matrix import Job, Units
from dsee_scale.pruning.units import ChosenUnits


def unit_jobs(
    module: nn.Module, chosen: Sequence[ChosenUnits], leaders: Mapping[str, str], config: PruneConfig
) -> list[Job]:
    """The matrices that change by more than the zeros of their units.

    Args:
        module: the model, for the record of earlier prunings.
        chosen: the units that go.
        leaders: by matrix, the first one that reads the same input.
        config: `block_steps`.
    """
    jobs = []
    for layer in chosen:
        for part in layer.layer.parts:
            if part.side == "inputs":
                gone, before = layer.gone[part.unit_of], layer.before[part.unit_of]
                going = (gone & ~before).nonzero().flatten()
                left, units = torch.cat([going, (~gone).nonzero().flatten()]), Units(len(going))
            elif config.block_steps and part.matrix.expert is None:
                left, units = None, Units(outputs=layer.gone[part.unit_of])
            else:
                continue
            jobs.append(_job(module, part, leaders, left, units))
    return jobs


def _job(module: nn.Module, part: Part, leaders: Mapping[str, str], left: Tensor | None, units: Units) -> Job:
    """Outside of a pattern of zeros an update covers every entry, and goes on; beside one, as it was pruned."""
    member = part.matrix
    how = model_state(module).pruned.get(member.param_name, {})
    zeros_stay = how.get("pattern", "heads") not in UNIT_PATTERNS
    return Job(
        member,
        0.0,
        leaders[member.name],
        left,
        units=units,
        zeros_stay=zeros_stay,
        keeps_low_rank=not zeros_stay or bool(how.get(MASK_UPDATE)),
    )


def without_units(job: Job, weight_OI: Tensor) -> Tensor:
    """W + D without the outputs that go, in place."""
    assert job.units is not None and job.units.outputs is not None
    return weight_OI.masked_fill_(job.units.outputs.to(weight_OI.device)[:, None], 0)


def note_refitted(module: nn.Module, members: Sequence[Matrix]) -> None:
    """Record that the base model's files do not hold these weights."""
    pruned = model_state(module).pruned
    for member in members:
        pruned[member.param_name] = {**pruned.get(member.param_name, {}), "content": ""}
