"""Every weight matrix under one address: a linear layer's weight, or one expert's slice of a fused parameter.

Since version 5 transformers keeps the experts of a layer in two parameters of three dimensions, (experts, outputs,
inputs) or (experts, inputs, outputs), and declares on the module which of them it is. A slice is a stretch of the
parameter's flat order, so whatever works on shards works on an expert's matrix: its part of a shard is a shard of its
own. An expert's matrix is named as if experts were modules, `layers.0.mlp.experts.3.down_proj`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.experts import AdaptedExperts, ExpertLayout, expert_layout
from dsee_scale.adapters.linear import delta_record, is_adapted
from dsee_scale.adapters.targets import linear_kind
from dsee_scale.algorithms.delta import Delta
from dsee_scale.partition.port import Partition, Shard, within

ShapeOf = Callable[[nn.Parameter], torch.Size]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """One weight matrix.

    Attributes:
        name: module name; of an expert's matrix see above.
        owner: name of the module that holds the parameter.
        module: that module.
        attribute: the parameter's name in it.
        shape: as stored, (O, I), or (I, O) if transposed.
        transposed: whether it is stored I x O.
        expert: which slice of the parameter it is, None for all of it.
    """

    name: str
    owner: str
    module: nn.Module
    attribute: str
    shape: tuple[int, int]
    transposed: bool
    expert: int | None = None

    @property
    def param(self) -> nn.Parameter:
        """The parameter that it is, or is a slice of."""
        return getattr(self.module, self.attribute)

    @property
    def param_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.owner}.{self.attribute}"

    @property
    def bias_name(self) -> str:
        """The name in the model of the parameter with its biases, where it has any."""
        return f"{self.owner}.{'bias' if self.expert is None else self.attribute + '_bias'}"

    @property
    def bias(self) -> nn.Parameter | None:
        """That parameter, (O,), or (E, O) for experts."""
        return getattr(self.module, self.bias_name.rpartition(".")[2], None)

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def offset(self) -> int:
        """Where it begins in the parameter's flat order."""
        return (self.expert or 0) * self.numel

    @property
    def outputs_by_inputs(self) -> tuple[int, int]:
        """(O, I), however it is stored."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.outputs_by_inputs[1]

    @property
    def adapted(self) -> bool:
        """Whether it has an update of its own."""
        return self.adapter is not None

    @property
    def adapter(self) -> Any:
        """What holds its update: the adapted layer, or the `ExpertWeight` of all experts; None for none."""
        if isinstance(self.module, AdaptedExperts):
            return self.module.dsee_weights(self.owner).get(self.param_name)
        return self.module if is_adapted(self.module) else None

    def delta(self, flat: Tensor) -> Delta:
        """Its update, given the adapter's whole parameter."""
        whole = delta_record(self.adapter, flat)
        return whole if self.expert is None else whole.of_expert(self.expert)

    def shard(self, partition: Partition) -> Shard:
        """This rank's stretch of it, to read; of length 0 where it lies on other ranks. Local."""
        return within(partition.shard(self.param), self.offset, self.numel)

    @contextlib.contextmanager
    def edit(self, partition: Partition) -> Iterator[list[Shard]]:
        """Every stored stretch of it, to write in place and alike; see `Partition.edit`. Local."""
        with partition.edit(self.param) as stretches:
            yield [within(each, self.offset, self.numel) for each in stretches]

    def of(self, whole: Tensor) -> Tensor:
        """The matrix as stored, a view of the whole parameter."""
        return whole if self.expert is None else whole[self.expert]


def find_matrices(model: nn.Module, shape_of: ShapeOf) -> dict[str, Matrix]:
    """Every linear layer's weight and every expert's matrices, by name, in the model's order. Local.

    Args:
        model: whole or partitioned, adapted or not.
        shape_of: true shape of a parameter.
    """
    found: list[Matrix] = []
    for name, module in model.named_modules():
        layout = expert_layout(module)
        if linear_kind(module):
            found.append(linear_matrix(name, module, shape_of))
        elif layout:
            found += expert_matrices(name, module, layout, shape_of)
    return {matrix.name: matrix for matrix in found}


def linear_matrix(name: str, module: nn.Module, shape_of: ShapeOf) -> Matrix:
    """A linear layer's weight."""
    rows, cols = shape_of(module.weight)  # type: ignore[arg-type]
    return Matrix(
        name=name,
        owner=name,
        module=module,
        attribute="weight",
        shape=(int(rows), int(cols)),
        transposed=linear_kind(module) == "conv1d",
    )


def expert_matrices(
    name: str, module: nn.Module, layout: ExpertLayout, shape_of: ShapeOf
) -> Iterator[Matrix]:
    """Every expert's matrices: those before the activation of all experts, then those after it."""
    for attribute in (layout.up, layout.down):
        experts, rows, cols = shape_of(getattr(module, attribute))
        for expert in range(experts):
            yield Matrix(
                name=f"{name}.{expert}.{attribute}",
                owner=name,
                module=module,
                attribute=attribute,
                shape=(int(rows), int(cols)),
                transposed=layout.transposed,
                expert=expert,
            )
