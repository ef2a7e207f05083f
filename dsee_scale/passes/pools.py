"""Which weights a pruning means: the linear layers of the blocks and their experts, dealt into pools."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from dsee_scale.adapters.matrices import Matrix, ShapeOf, find_matrices
from dsee_scale.adapters.targets import linear_kind, matches
from dsee_scale.config import Pool, PruneConfig
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.passes.coverage import block_prefixes


@dataclass(frozen=True)
class WeightPool:
    """Weights ranked together, in the model's order, which is the order that breaks ties."""

    name: str
    sparsity: float
    members: tuple[Matrix, ...]

    @property
    def starts(self) -> list[int]:
        """Position in the pool of each weight's first entry."""
        return list(itertools.accumulate((member.numel for member in self.members[:-1]), initial=0))

    @property
    def total(self) -> int:
        """Entries of all weights."""
        return sum(member.numel for member in self.members)

    @property
    def num_remove(self) -> int:
        """Entries that go: the sparsity's share of the total, rounded to the nearest whole number."""
        return min(round(self.sparsity * self.total), self.total - 1)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the repeated blocks (the model's ModuleLists): no embedding, no output head."""
    prefixes = tuple(block_prefixes(model))
    return {
        name: module
        for name, module in model.named_modules()
        if linear_kind(module) and name.startswith(prefixes)
    }


def block_matrices(model: nn.Module, shape_of: ShapeOf) -> dict[str, Matrix]:
    """The matrices inside the repeated blocks: those of linear layers and of experts."""
    prefixes = tuple(block_prefixes(model))
    return {
        name: matrix for name, matrix in find_matrices(model, shape_of).items() if name.startswith(prefixes)
    }


def find_pools(model: nn.Module, config: PruneConfig, shape_of: ShapeOf) -> list[WeightPool]:
    """The pools of a pruning; with scope `matrix` or `row` each weight is a pool of its own.

    Raises:
        TargetError: `modules` matches nothing, or a weight that is more than a linear layer's.
        ConfigError: a pool is empty, or two pools share a weight.
    """
    weights = _once(model, _prunable(model, config, shape_of))
    assert config.pools or config.sparsity is not None, "PruneConfig settles it"
    pools = config.pools or (Pool(name="all", sparsity=config.sparsity or 0.0),)
    taken: dict[str, str] = {}
    result = []
    for pool in pools:
        for pattern in pool.modules:
            if not any(matches(matrix.name, (pattern,)) for matrix in weights):
                raise ConfigError(
                    f"pool {pool.name!r}: modules {pattern!r} matches no weight; prunable layers: "
                    f"{_suffixes(matrix.name for matrix in weights)}"
                )
        chosen = [matrix for matrix in weights if _selects(pool, matrix)]
        if not chosen:
            raise ConfigError(
                f"pool {pool.name!r} matches no weight (select={pool.select!r}, modules={list(pool.modules)}); "
                f"prunable layers: {_suffixes(matrix.name for matrix in weights)}"
            )
        for name in (matrix.name for matrix in chosen):
            if name in taken:
                raise ConfigError(
                    f"pools {taken[name]!r} and {pool.name!r} both hold {name}; make them disjoint with "
                    "select or modules"
                )
            taken[name] = pool.name
        if config.scope == "global":
            result.append(WeightPool(pool.name, pool.sparsity, tuple(chosen)))
        else:
            result += [WeightPool(matrix.name, pool.sparsity, (matrix,)) for matrix in chosen]
    return result


def by_expert(members: Iterable[Matrix], model: nn.Module, shape_of: ShapeOf) -> list[Matrix]:
    """Each expert's own matrices in place of a parameter that holds those of all."""
    pieces: dict[int, list[Matrix]] = {}
    for matrix in block_matrices(model, shape_of).values():
        pieces.setdefault(id(matrix.param), []).append(matrix)
    return [
        piece
        for each in members
        for piece in (pieces.get(id(each.param), [each]) if each.expert is None else [each])
    ]


def _prunable(model: nn.Module, config: PruneConfig, shape_of: ShapeOf) -> dict[str, Matrix]:
    if not config.modules:
        weights = block_matrices(model, shape_of)
        if not weights:
            raise TargetError(
                "the model has no linear layers inside blocks (nn.ModuleList); name some in `modules`"
            )
        return weights
    matrices = find_matrices(model, shape_of)
    for pattern in config.modules:
        if not any(matches(name, (pattern,)) or fnmatch.fnmatchcase(name, pattern) for name in matrices):
            raise TargetError(
                f"PruneConfig.modules {pattern!r} matches no linear layer; existing: {_suffixes(matrices)}"
            )
    return {name: matrix for name, matrix in matrices.items() if matches(name, config.modules)}


def _once(model: nn.Module, chosen: Mapping[str, Matrix]) -> list[Matrix]:
    """Layers that share a weight count once, under the first one's name; a weight tied to an embedding is refused."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(param), []).append(name)
    first: dict[tuple[int, int], Matrix] = {}
    for matrix in chosen.values():
        first.setdefault((id(matrix.param), matrix.offset), matrix)
        for other in holders.get(id(matrix.param), []) if matrix.expert is None else ():
            owner = other.rpartition(".")[0]
            if not linear_kind(modules[owner]):
                raise TargetError(
                    f"{matrix.param_name} is also {other}, of a {type(modules[owner]).__name__}, which would be pruned "
                    f"with it; leave {matrix.name} out of the pruning, or load the model with "
                    "tie_word_embeddings=False"
                )
    return list(first.values())


def _selects(pool: Pool, matrix: Matrix) -> bool:
    kind_fits = pool.select == "all" or matrix.adapted == (pool.select == "adapted")
    return kind_fits and (not pool.modules or matches(matrix.name, pool.modules))


def _suffixes(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
