"""Heads, neurons and experts of a model: which rows and columns of which matrices each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsee_scale.adapters.families import Experts, Family, family_of, find_blocks, inner
from dsee_scale.adapters.matrices import (
    ExpertLayout,
    Matrix,
    ShapeOf,
    expert_layout,
    expert_matrices,
    linear_matrix,
)
from dsee_scale.adapters.targets import linear_kind
from dsee_scale.errors import TargetError
from dsee_scale.partition.quantized import holds_numbers, quantised_kind

Kind = Literal["heads", "neurons", "experts"]
Side = Literal["outputs", "inputs"]


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a layer's units.

    Attributes:
        matrix: the weight.
        side: whether units are its outputs or its inputs.
        unit_of: (O,) or (I,) int64, the unit of each output or input.
    """

    matrix: Matrix
    side: Side
    unit_of: Tensor

    @property
    def name(self) -> str:
        """The matrix's name."""
        return self.matrix.name

    @property
    def module(self) -> nn.Module:
        """The module that holds it."""
        return self.matrix.module

    @property
    def shape(self) -> tuple[int, int]:
        """True (O, I)."""
        return self.matrix.outputs_by_inputs

    @property
    def transposed(self) -> bool:
        """Whether it is stored I x O."""
        return self.matrix.transposed

    @property
    def axis(self) -> int:
        """The stored matrix's axis that runs over units: 0 for rows, 1 for columns."""
        return int((self.side == "inputs") != self.transposed)

    @property
    def has_unit_bias(self) -> bool:
        """Whether the layer has a bias with entries that belong to units."""
        return self.side == "outputs" and self.matrix.bias is not None


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """The heads, the neurons or the experts of one block.

    Attributes:
        name: of the block.
        kind: `heads`, `neurons` or `experts`.
        num_units: U; a key/value group is one unit.
        unit_size: query heads in a unit; 1 for others.
        head_size: outputs of one head; 1 for others.
        parts: the matrices.
        groups: runs of equally many units that lose equally many: the neurons of each expert, or the experts that a
            router chooses among together.
        router: what chooses among the experts.
        router_name: its name in the model.
        top: experts that a token goes to.
        in_group: experts that a router of several groups takes from one of them, at most.
    """

    name: str
    kind: Kind
    num_units: int
    unit_size: int
    head_size: int
    parts: tuple[Part, ...]
    groups: int = 1
    router: nn.Module | None = None
    router_name: str = ""
    top: int = 0
    in_group: int = 0

    @property
    def size(self) -> int:
        """Query heads, neurons or experts of the block."""
        return self.num_units * self.unit_size


def find_units(model: nn.Module, kind: Kind, shape_of: ShapeOf) -> list[UnitLayer]:
    """The heads, the neurons or the experts of every block, in the model's order. Reads names and shapes only.

    Of a mixture of experts the neurons are those of its experts; a block without experts has none to remove.

    Raises:
        TargetError: an unknown architecture, or blocks that are not as described.
    """
    family = family_of(model)
    if kind == "heads" and family.heads:
        raise TargetError(f"heads of {family.name} can't be removed: {family.heads}; choose another pattern")
    if kind == "experts" and family.experts is None:
        raise TargetError(
            f"{type(model).__name__} has no experts, so pattern 'experts' has nothing to remove; choose 'heads' or "
            "'neurons'"
        )
    blocks = find_blocks(model, family)
    if kind == "neurons":
        _reject_activation(model, family)
    if kind == "heads":
        return [_heads(name, block, family, shape_of) for name, block in blocks.items()]
    if family.experts is None:
        return [_neurons(name, block, family, shape_of) for name, block in blocks.items()]
    return _in_experts(model, kind, blocks, family.experts, shape_of)


def _heads(name: str, block: nn.Module, family: Family, shape_of: ShapeOf) -> UnitLayer:
    head_size = int(inner(block, family.head_size, name))
    fused = len(family.qkv) == 1
    width = _shape(name, block, family.qkv[0], shape_of)[0] // (3 if fused else 1)
    kv_width = width if fused else _shape(name, block, family.qkv[1], shape_of)[0]
    num_heads, num_units = width // head_size, kv_width // head_size
    unit_size = num_heads // num_units
    by_query = torch.arange(width) // (head_size * unit_size)
    by_kv = torch.arange(kv_width) // head_size
    owners = (torch.cat([by_query, by_kv, by_kv]),) if fused else (by_query, by_kv, by_kv)
    parts = [
        _part(name, block, path, "outputs", unit_of, shape_of)
        for path, unit_of in zip(family.qkv, owners, strict=True)
    ]
    parts.append(_part(name, block, family.o, "inputs", by_query, shape_of))
    return UnitLayer(name, "heads", num_units, unit_size, head_size, tuple(parts))


def _neurons(name: str, block: nn.Module, family: Family, shape_of: ShapeOf) -> UnitLayer:
    num_units = _shape(name, block, family.down, shape_of)[1]
    unit_of = torch.arange(num_units)
    parts = [_part(name, block, path, "outputs", unit_of, shape_of) for path in family.up]
    parts.append(_part(name, block, family.down, "inputs", unit_of, shape_of))
    return UnitLayer(name, "neurons", num_units, 1, 1, tuple(parts))


def _in_experts(
    model: nn.Module, kind: Kind, blocks: Mapping[str, nn.Module], where: Experts, shape_of: ShapeOf
) -> list[UnitLayer]:
    """The experts of each block that has any, or their neurons."""
    found = []
    for name, block in blocks.items():
        try:
            module = block.get_submodule(where.path)
        except AttributeError:
            continue
        layout = expert_layout(module)
        if layout is None:
            raise TargetError(
                f"{name}.{where.path} is a {type(module).__name__}, whose experts are laid out in a way that is not "
                "known here; leave them out of the pruning"
            )
        owner = f"{name}.{where.path}"
        if kind == "neurons":
            found.append(_expert_neurons(name, owner, module, layout, shape_of))
            continue
        names = [layout.up, layout.down]
        names += [f"{each}_bias" for each in names] if layout.bias else []
        parts = tuple(_rows(owner, module, each, shape_of) for each in names)
        groups = int(getattr(model.config, where.group_key or "", 1) or 1)
        experts, top = parts[0].shape[0], int(getattr(model.config, where.top_key))
        found.append(
            UnitLayer(
                name,
                "experts",
                experts,
                1,
                1,
                parts,
                groups,
                router=inner(block, where.router, name),
                router_name=f"{name}.{where.router}",
                top=top,
                in_group=_taken_from_a_group(model.config, where, top) if groups > 1 else 0,
            )
        )
    return found


def _taken_from_a_group(config: Any, where: Experts, top: int) -> int:
    """Experts of one group that a router looks at: by two it scores a group, and as many chosen ones may lie in it."""
    chosen = int(getattr(config, where.top_group_key or "", 1) or 1)
    return max(2, -(-top // chosen))


def _rows(owner: str, module: nn.Module, attribute: str, shape_of: ShapeOf) -> Part:
    """A parameter of all experts as a matrix with one row for each."""
    shape = shape_of(getattr(module, attribute))
    matrix = Matrix(
        name=f"{owner}.{attribute}",
        owner=owner,
        module=module,
        attribute=attribute,
        shape=(int(shape[0]), shape.numel() // int(shape[0])),
        transposed=False,
    )
    return Part(matrix, "outputs", torch.arange(shape[0]))


def _expert_neurons(
    name: str, owner: str, module: nn.Module, layout: ExpertLayout, shape_of: ShapeOf
) -> UnitLayer:
    matrices = list(expert_matrices(owner, module, layout, shape_of))
    experts, size = len(matrices) // 2, matrices[-1].num_inputs
    parts = []
    for matrix in matrices:
        unit_of = torch.arange(size) + (matrix.expert or 0) * size
        if matrix.attribute == layout.down:
            parts.append(Part(matrix, "inputs", unit_of))
            continue
        if layout.gated:
            unit_of = unit_of.repeat_interleave(2) if layout.interleaved else unit_of.repeat(2)
        parts.append(Part(matrix, "outputs", unit_of))
    return UnitLayer(name, "neurons", experts * size, 1, 1, tuple(parts), groups=experts)


def _part(name: str, block: nn.Module, path: str, side: Side, unit_of: Tensor, shape_of: ShapeOf) -> Part:
    shape = _shape(name, block, path, shape_of)
    if shape[side == "inputs"] != len(unit_of):
        raise TargetError(
            f"{name}.{path} has {shape[side == 'inputs']} {side}, expected {len(unit_of)} from its neighbours"
        )
    return Part(linear_matrix(f"{name}.{path}", inner(block, path, name), shape_of), side, unit_of)


def _shape(name: str, block: nn.Module, path: str, shape_of: ShapeOf) -> tuple[int, int]:
    """True (O, I)."""
    module = inner(block, path, name)
    kind = linear_kind(module)
    if kind is None or quantised_kind(module) or not holds_numbers(module.weight.dtype):
        raise TargetError(
            f"{name}.{path} is a {type(module).__name__}; heads and neurons are removed from nn.Linear or Conv1D "
            "with floating-point weights: prune an unquantised base, or choose pattern 'unstructured' or N:M"
        )
    return linear_matrix(name, module, shape_of).outputs_by_inputs


def _reject_activation(model: nn.Module, family: Family) -> None:
    """A neuron whose activation of 0 is not 0 would shift the output when it is taken away."""
    from transformers.activations import ACT2FN

    name = getattr(model.config, family.activation)
    if isinstance(name, str) and float(ACT2FN[name](torch.zeros(1))) != 0:
        raise TargetError(
            f"activation {name!r} of 0 is not 0, so a zeroed neuron still has an output; expected one like "
            "gelu, silu or relu"
        )
