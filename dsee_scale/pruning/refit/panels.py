"""A wide Gram matrix factorised by all ranks together, in panels of columns.

Each panel is factorised by the rank it was dealt to and broadcast; then every rank takes it from its own later panels.
Of the triangle's inverse each rank solves its own panels. What is multiplied with what depends on the matrix's size
alone, so the result is the same, bit for bit, on any number of ranks. On one it takes no longer than LAPACK.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def inverse_by_panels(damped_II: Tensor, partition: Partition) -> Tensor | None:
    """Collective. As `algorithms.refit.inverse_cholesky`, of a matrix that every rank has; it is overwritten.

    Extra memory: the result and two panels.
    """
    factoring, inverting = (deal(costs, partition.world_size) for costs in panel_costs(len(damped_II)))
    panels = [slice(start, start + PANEL) for start in range(0, len(damped_II), PANEL)]
    _factor_(damped_II, panels, factoring, partition)
    return _inverse(damped_II, panels, inverting, partition) if torch.isfinite(damped_II).all() else None


def _factor_(gram_II: Tensor, panels: Sequence[slice], owners: Sequence[int], partition: Partition) -> None:
    """Collective. L in place of G on every rank; NaN where a pivot is not positive."""
    for index, (here, owner) in enumerate(zip(panels, owners, strict=True)):
        panel = gram_II[here.start :, here].contiguous()
        if owner == partition.rank:
            width = panel.shape[1]
            top, failed = torch.linalg.cholesky_ex(panel[:width])
            panel[:width] = torch.nan if failed else top
            panel[width:] = torch.linalg.solve_triangular(top.T, panel[width:], upper=True, left=False)
        gram_II[here.start :, here] = partition.broadcast(panel, owner)
        gram_II[: here.start, here] = 0
        for later, mine in zip(panels[index + 1 :], owners[index + 1 :], strict=True):
            if mine == partition.rank:
                rest = panel[later.start - here.start :]
                gram_II[later.start :, later].addmm_(rest, rest[:PANEL].T, alpha=-1)


def _inverse(
    lower_II: Tensor, panels: Sequence[slice], owners: Sequence[int], partition: Partition
) -> Tensor:
    """Collective. L^-1 on every rank, each panel from its diagonal down by forward substitution."""
    inverse_II = torch.zeros_like(lower_II)
    steps = []
    for here in panels:
        block = lower_II[here, here]
        steps.append(torch.linalg.solve_triangular(block, torch.eye(len(block)).to(block), upper=False))
    for index, (here, owner) in enumerate(zip(panels, owners, strict=True)):
        if owner != partition.rank:
            continue
        panel = lower_II.new_zeros(len(lower_II) - here.start, steps[index].shape[1])
        panel[: len(steps[index])] = steps[index]
        for step, at in zip(steps[index + 1 :], panels[index + 1 :], strict=True):
            above = at.start - here.start
            panel[above : above + PANEL] = (
                step @ (lower_II[at, here.start : at.start] @ panel[:above])
            ).neg_()
        inverse_II[here.start :, here] = panel
    for here, owner in zip(panels, owners, strict=True):
        panel = inverse_II[here.start :, here].contiguous()
        inverse_II[here.start :, here] = partition.broadcast(panel, owner)
    return inverse_II
