"""Which weights a pruning means: the linear layers of the blocks, dealt into pools."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dsee_scale.adapters.linear import is_adapted
from dsee_scale.adapters.targets import linear_kind, matches
from dsee_scale.config import Pool, PruneConfig
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.passes.coverage import block_prefixes


@dataclass(frozen=True)
class Member:
    """One prunable weight.

    Attributes:
        name: module name; the weight is `name + ".weight"`.
        module: the layer.
        start: global position of its first entry in the pool.
        shape: the weight's true shape as stored (O x I, or I x O for Conv1D).
    """

    name: str
    module: nn.Module
    start: int
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored I x O."""
        return linear_kind(self.module) == "conv1d"

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def param(self) -> nn.Parameter:
        """The weight."""
        return self.module.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class WeightPool:
    """Weights ranked together, in the model's order, which is the order that breaks ties."""

    name: str
    sparsity: float
    members: tuple[Member, ...]

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


def find_pools(
    model: nn.Module, config: PruneConfig, shape_of: Callable[[nn.Parameter], torch.Size]
) -> list[WeightPool]:
    """The pools of a pruning; with scope `matrix` or `row` each weight is a pool of its own.

    Raises:
        TargetError: `modules` matches nothing, or a weight that is more than a linear layer's.
        ConfigError: a pool is empty, or two pools share a weight.
    """
    weights = _once(model, _prunable(model, config))
    assert config.pools or config.sparsity is not None, "PruneConfig settles it"
    pools = config.pools or (Pool(name="all", sparsity=config.sparsity or 0.0),)
    taken: dict[str, str] = {}
    result = []
    for pool in pools:
        chosen = {name: module for name, module in weights.items() if _selects(pool, name, module)}
        if not chosen:
            raise ConfigError(
                f"pool {pool.name!r} matches no weight (select={pool.select!r}, modules={list(pool.modules)}); "
                f"prunable layers: {_suffixes(weights)}"
            )
        for name in chosen:
            if name in taken:
                raise ConfigError(
                    f"pools {taken[name]!r} and {pool.name!r} both hold {name}; make them disjoint with "
                    "select or modules"
                )
            taken[name] = pool.name
        members = [(name, module, _stored_shape(module, shape_of)) for name, module in chosen.items()]
        result += _pools(pool, members, per_matrix=config.scope != "global")
    return result


def _pools(
    pool: Pool, members: list[tuple[str, nn.Module, tuple[int, int]]], *, per_matrix: bool
) -> list[WeightPool]:
    if per_matrix:
        return [
            WeightPool(name, pool.sparsity, (Member(name, module, 0, shape),))
            for name, module, shape in members
        ]
    at, placed = 0, []
    for name, module, shape in members:
        placed.append(Member(name, module, at, shape))
        at += shape[0] * shape[1]
    return [WeightPool(pool.name, pool.sparsity, tuple(placed))]


def _prunable(model: nn.Module, config: PruneConfig) -> dict[str, nn.Module]:
    weights = block_linears(model)
    if not config.modules:
        if not weights:
            raise TargetError(
                "the model has no linear layers inside blocks (nn.ModuleList); name some in `modules`"
            )
        return weights
    linears = {name: module for name, module in model.named_modules() if linear_kind(module)}
    for pattern in config.modules:
        if not any(matches(name, (pattern,)) or fnmatch.fnmatchcase(name, pattern) for name in linears):
            raise TargetError(
                f"PruneConfig.modules {pattern!r} matches no linear layer; existing: {_suffixes(linears)}"
            )
    return {name: module for name, module in linears.items() if matches(name, config.modules)}


def _once(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Layers that share a weight count once, under the first one's name; a weight tied to an embedding is refused."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(param), []).append(name)
    first: dict[int, str] = {}
    for name, module in chosen.items():
        weight = id(module.weight)
        first.setdefault(weight, name)
        for other in holders.get(weight, []):
            owner = other.rpartition(".")[0]
            if not linear_kind(modules[owner]):
                raise TargetError(
                    f"{name}.weight is also {other}, of a {type(modules[owner]).__name__}, which would be pruned with "
                    f"it; leave {name} out of the pruning, or load the model with tie_word_embeddings=False"
                )
    return {name: module for name, module in chosen.items() if first[id(module.weight)] == name}


def _selects(pool: Pool, name: str, module: nn.Module) -> bool:
    kind_fits = pool.select == "all" or is_adapted(module) == (pool.select == "adapted")
    return kind_fits and (not pool.modules or matches(name, pool.modules))


def _stored_shape(module: nn.Module, shape_of: Callable[[nn.Parameter], torch.Size]) -> tuple[int, int]:
    rows, cols = shape_of(module.weight)  # type: ignore[arg-type]
    return int(rows), int(cols)


def _suffixes(weights: dict[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in weights}))
