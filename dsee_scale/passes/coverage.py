"""How much of a model's blocks a pass reaches, so that "50% pruned" never means a fraction of a fraction."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dsee_scale.adapters.matrices import Matrix, ShapeOf

LEAST = 0.9
"""Share of the blocks' matrix parameters that must be in linear layers for a pruning of them all to be let pass."""


@dataclass(frozen=True)
class Coverage:
    """Parameters of two dimensions or more inside a model's repeated blocks.

    Attributes:
        covered: entries of those that a pass means.
        total: entries of all of them.
        missed: those in no linear layer: name, with * for numbers -> entries.
    """

    covered: int
    total: int
    missed: dict[str, int]

    @property
    def share(self) -> float:
        """Fraction of the entries that is covered."""
        return self.covered / self.total if self.total else 1.0

    def names(self) -> str:
        """The missed ones, the largest first."""
        largest = sorted(self.missed.items(), key=lambda item: -item[1])
        more = f" and {len(largest) - 4} more" if len(largest) > 4 else ""
        return ", ".join(f"{name} ({numel:,})" for name, numel in largest[:4]) + more

    def __str__(self) -> str:
        text = f"{self.covered:,} of the blocks' {self.total:,} matrix parameters ({100 * self.share:.1f}%)"
        return text + (f"; in no linear layer: {self.names()}" if self.missed else "")


def block_prefixes(model: nn.Module) -> list[str]:
    """How the names of what lies inside the repeated blocks (the model's ModuleLists) begin."""
    return [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def block_coverage(
    model: nn.Module,
    covered: Iterable[Matrix],
    reachable: Iterable[Matrix],
    shape_of: ShapeOf,
) -> Coverage:
    """What a pass reaches of the blocks. Local, from names and true shapes.

    Args:
        model: the model, adapted or not.
        covered: the matrices that the pass means.
        reachable: those that it could mean.
        shape_of: true shape of a parameter.
    """
    prefixes = tuple(block_prefixes(model))
    shapes = {
        name: (id(param), shape_of(param))
        for name, param in model.named_parameters()
        if len(shape_of(param)) >= 2 and name.startswith(prefixes)
    }
    known = {id(matrix.param) for matrix in reachable}
    counted: dict[int, dict[int, int]] = {}
    for matrix in covered:  # several prunings may mean a whole parameter and single experts of it
        pieces = counted.setdefault(id(matrix.param), {})
        pieces[matrix.offset] = max(matrix.numel, pieces.get(matrix.offset, 0))
    missed: dict[str, int] = {}
    for name, (param, shape) in shapes.items():
        if param not in known:
            shown = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            missed[shown] = missed.get(shown, 0) + shape.numel()
    return Coverage(
        sum(
            min(shape.numel(), sum(counted[param].values()))
            for param, shape in shapes.values()
            if param in counted
        ),
        sum(shape.numel() for _, shape in shapes.values()),
        missed,
    )
