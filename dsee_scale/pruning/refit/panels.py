"""A wide Gram matrix factorised by all ranks together, in panels of columns.

Each panel is factorised by the rank it was dealt to and broadcast; then every rank takes it from its own later panels.
Of the triangle's inverse each rank solves its own panels. What is multiplied with what depends on the matrix's size
alone, so the result is the same, bit for bit, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsee_scale.algorithms.score import all_finite
from dsee_scale.partition import Partition
from dsee_scale.passes.deal import deal

WIDE = 8192
"""From so many inputs on, ranks share the work; of narrower ones, experts' above all, there are enough for all."""
PANEL = 128
"""Columns of a panel: narrow enough that 64 ranks get even shares."""


def is_wide(inputs: int) -> bool:
    """Whether a Gram matrix of so many inputs is factorised by all ranks."""
    return inputs >= WIDE


def panel_costs(inputs: int) -> tuple[list[int], list[int]]:
    """Multiplications, about, that each panel takes from its owner: in the factorisation, and in the inverse."""
    starts = range(0, inputs, PANEL)
    return (
        [PANEL * (inputs - start) * (start + PANEL) for start in starts],
        [PANEL * (inputs - start) ** 2 // 2 for start in starts],
    )


def upper_inverse_by_panels(reversed_II: Tensor, partition: Partition) -> Tensor | None:
    """Collective. As `algorithms.refit.upper_inverse`, of a matrix that every rank has; it is overwritten.

    Extra memory: the result and two panels.
    """
    factoring, inverting = (deal(costs, partition.world_size) for costs in panel_costs(len(reversed_II)))
    panels = [slice(start, start + PANEL) for start in range(0, len(reversed_II), PANEL)]
    _factor_(reversed_II, panels, factoring, partition)
    if not all_finite(reversed_II.diagonal()):
        return None
    return _inverse(reversed_II, panels, inverting, partition)


def _factor_(gram_II: Tensor, panels: Sequence[slice], owners: Sequence[int], partition: Partition) -> None:
    """Collective. L in the lower triangle on every rank; NaN on its diagonal where a pivot is not positive."""
    for index, (here, owner) in enumerate(zip(panels, owners, strict=True)):
        panel = gram_II[here.start :, here].contiguous()
        if owner == partition.rank:
            width = panel.shape[1]
            top, failed = torch.linalg.cholesky_ex(panel[:width])
            panel[:width] = torch.nan if failed else top
            panel[width:] = torch.linalg.solve_triangular(top.T, panel[width:], upper=True, left=False)
        gram_II[here.start :, here] = partition.broadcast(panel, owner)
        for later, mine in zip(panels[index + 1 :], owners[index + 1 :], strict=True):
            if mine == partition.rank:
                rest = panel[later.start - here.start :]
                gram_II[later.start :, later].addmm_(rest, rest[:PANEL].T, alpha=-1)


def _inverse(
    lower_II: Tensor, panels: Sequence[slice], owners: Sequence[int], partition: Partition
) -> Tensor:
    """Collective. L^-1 on every rank with its inputs in reverse; each panel by forward substitution."""
    size = len(lower_II)
    steps = []
    for here in panels:
        block = lower_II[here, here]
        steps.append(torch.linalg.solve_triangular(block, torch.eye(len(block)).to(block), upper=False))
    upper_II = torch.zeros_like(lower_II)
    for index, (here, owner) in enumerate(zip(panels, owners, strict=True)):
        if owner != partition.rank:
            continue
        panel = lower_II.new_zeros(size - here.start, steps[index].shape[1])
        panel[: len(steps[index])] = steps[index]
        for step, at in zip(steps[index + 1 :], panels[index + 1 :], strict=True):
            above = at.start - here.start
            panel[above : above + PANEL] = (
                step @ (lower_II[at, here.start : at.start] @ panel[:above])
            ).neg_()
        _reversed(upper_II, here).copy_(panel.flip(0, 1))
    for here, owner in zip(panels, owners, strict=True):
        panel = _reversed(upper_II, here).contiguous()
        _reversed(upper_II, here).copy_(partition.broadcast(panel, owner))
    return upper_II


def _reversed(upper_II: Tensor, panel: slice) -> Tensor:
    """Where a panel of L^-1, from its diagonal down, lies in U."""
    size = len(upper_II)
    stop = min(panel.stop, size)
    return upper_II[: size - panel.start, size - stop : size - panel.start]
