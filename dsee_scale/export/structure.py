"""Physically smaller models: which rows and columns a file leaves out, and the config that says so.

A model whose layers all lost the same number of heads and neurons is an ordinary model of smaller sizes,
where its config can say so. Otherwise the folder keeps the sizes of the original in `config.json`, and
`dsee_structure.json` tells `load_pretrained` what each block really has.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.families import family_of
from dsee_scale.adapters.matrices import ShapeOf
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.routers import router_tensors
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import UnitLayer, find_units
from dsee_scale.checkpoint.folder import FORMAT_VERSION
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.config import UNIT_PATTERNS

STRUCTURE_FILE = "dsee_structure.json"


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What one transformer block has; None where nothing of the kind was removed from the model."""

    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads."""
    head_size: int | None = None
    """Outputs of one head."""
    neurons: int | None = None
    """Feed-forward neurons; of a mixture of experts those of each expert."""
    experts: int | None = None
    """Routed experts."""

    def size(self, what: str) -> int | None:
        """One of the fields, or `width`, the size of all query heads together."""
        if what == "width":
            return None if self.heads is None or self.head_size is None else self.heads * self.head_size
        return getattr(self, what)


@dataclass(frozen=True, eq=False)
class Cut:
    """Lines of a tensor that stay.

    Attributes:
        axis: along which they lie.
        indices: (K,) those that stay; or (E, K), for each slice along the first axis its own.
    """

    axis: int
    indices: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape afterwards."""
        return tuple(self.indices.shape[-1] if i == self.axis else size for i, size in enumerate(shape))

    def apply(self, tensor: Tensor) -> Tensor:
        """The lines that stay."""
        indices = self.indices.to(tensor.device)
        if indices.dim() == 1:
            return tensor.index_select(self.axis, indices)
        slices = zip(tensor, indices, strict=True)
        return torch.stack([one.index_select(self.axis - 1, stay) for one, stay in slices])


@dataclass(frozen=True)
class Structure:
    """What is left of a model's heads, neurons and experts.

    Attributes:
        blocks: sizes by name of the block.
        whole: sizes of the blocks before anything was removed.
        cuts: name of a parameter or buffer that gets smaller -> what stays, one cut after the other.
        num_removed: entries of all parameters that are cut out.
    """

    blocks: dict[str, BlockSizes]
    whole: dict[str, BlockSizes]
    cuts: dict[str, list[Cut]]
    num_removed: int

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's shape in the files."""
        for cut in self.cuts.get(name, ()):
            shape = cut.shape(shape)
        return shape

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter without what was removed."""
        for cut in self.cuts.get(name, ()):
            tensor = cut.apply(tensor)
        return tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        blocks = {
            name: {what: size for what, size in dataclasses.asdict(sizes).items() if size is not None}
            for name, sizes in self.blocks.items()
        }
        return {"version": FORMAT_VERSION, "blocks": blocks}

    def summary(self) -> str:
        """One line for people."""
        parts = []
        for what in UNIT_PATTERNS:
            left = sum(sizes.size(what) or 0 for sizes in self.blocks.values())
            total = sum(sizes.size(what) or 0 for sizes in self.whole.values())
            if left < total:
                parts.append(f"{total - left:,} of {total:,} {what}")
        blocks = f"{len(self.blocks)} blocks"
        return f"{' and '.join(parts)} cut out of {blocks}: {self.num_removed:,} parameters fewer"


def find_structure(model: nn.Module, shape_of: ShapeOf) -> Structure | None:
    """What the record of a model's prunings leaves of it; `as_loaded` where nothing whole was removed. Local.

    Raises:
        FormatError: the record does not fit the model.
    """
    recorded = {key for prune_info in model_state(model).pruned.values() for key in prune_info}
    if recorded.isdisjoint(UNIT_PATTERNS):
        return as_loaded(model)
    cuts: dict[str, list[Cut]] = {}
    blocks = model_state(model).blocks or {}
    left: dict[str, dict[str, int]] = {name: dict(sizes) for name, sizes in blocks.items()}
    whole: dict[str, dict[str, int]] = {name: dict(sizes) for name, sizes in blocks.items()}
    described = family_of(model).experts is None
    for kind in UNIT_PATTERNS:  # experts last: the cuts before it count them all
        if kind not in recorded and not (described and kind in ("heads", "neurons")):
            continue
        for layer in find_units(model, kind, shape_of):  # type: ignore[arg-type]
            gone = removed_units(model, layer)
            if gone.any():
                for name, cut in _cuts(layer, gone, shape_of):
                    cuts.setdefault(name, []).append(cut)
            for sizes, num_units in ((left, int((~gone).sum())), (whole, layer.num_units)):
                sizes.setdefault(layer.name, {}).update(_sizes(layer, num_units))
    num_removed = 0
    for name, param in model.named_parameters():
        shape = tuple(shape_of(param))
        num_removed += math.prod(shape)
        for cut in cuts.get(name, ()):
            shape = cut.shape(shape)
        num_removed -= math.prod(shape)
    return Structure(
        {name: BlockSizes(**sizes) for name, sizes in left.items()},
        {name: BlockSizes(**sizes) for name, sizes in whole.items()},
        cuts,
        num_removed,
    )


def as_loaded(model: nn.Module) -> Structure | None:
    """The blocks of a model that `load_pretrained` gave other sizes than its config says; None for any other. Local."""
    blocks = model_state(model).blocks
    if blocks is None:
        return None
    sizes = {name: BlockSizes(**sizes) for name, sizes in blocks.items()}
    return Structure(sizes, sizes, {}, 0)


def _sizes(layer: UnitLayer, num_units: int) -> dict[str, int]:
    """Fields of `BlockSizes`."""
    if layer.kind == "heads":
        heads = num_units * layer.unit_size
        return {"heads": heads, "kv_heads": num_units, "head_size": layer.head_size}
    return {layer.kind: num_units // (layer.groups if layer.kind == "neurons" else 1)}


def _cuts(layer: UnitLayer, gone: Tensor, shape_of: ShapeOf) -> Iterator[tuple[str, Cut]]:
    """What stays of each tensor, where some units of a layer are gone."""
    by_expert: dict[str, list[Tensor]] = {}
    for part in layer.parts:
        stay = (~gone[part.unit_of]).nonzero().flatten()
        names = [(part.matrix.param_name, part.axis)]
        names += [(part.matrix.bias_name, 0)] if part.has_unit_bias else []
        for name, axis in names:
            if part.matrix.expert is None:
                yield name, Cut(axis, stay)
            else:  # the slices of one tensor follow each other
                slices = by_expert.setdefault(name, [])
                slices.append(stay)
                if len(slices) == layer.groups:
                    yield name, Cut(axis + 1, torch.stack(slices))
    if layer.router is not None:
        for name in router_tensors(layer.router, layer.num_units, shape_of):
            yield f"{layer.router_name}.{name}", Cut(0, (~gone).nonzero().flatten())


def smaller_config(model: Any, structure: Structure, shape_of: ShapeOf) -> tuple[Any | None, str | None]:
    """A config with which the stock class has exactly the tensors of the files. Local.

    Returns:
        The config and None, or None and why there is none.
    """
    family = family_of(model)
    left, whole, kind = _common(structure.blocks), _common(structure.whole), type(model.config).__name__
    if left is None or whole is None:
        return None, f"its blocks are not alike, which {kind} cannot say"
    experts = family.experts
    values = model.config.to_dict()
    if left.neurons is not None:
        values[experts.neuron_key if experts else family.neuron_key] = left.neurons
    if experts and left.experts is not None:
        values[experts.count_key] = left.experts
    if left.heads != whole.heads:
        if not family.head_keys:
            return None, f"{kind} cannot say a number of heads apart from the hidden size"
        values |= {key: left.size(what) for key, what in family.head_keys.items()}
    try:
        config = type(model.config).from_dict(values)
        with torch.device("meta"):
            stock = type(model)(copy.deepcopy(config))
    except Exception as error:  # each config class refuses sizes that it does not know in its own way
        return None, f"{kind}: {str(error.__cause__ or error).strip().splitlines()[-1].strip()}"
    expected = {
        name: structure.shape(name, tuple(shape_of(param)))
        for name, param in model.named_parameters()
        if not is_adapter_key(name)
    }
    found = {name: tuple(param.shape) for name, param in stock.named_parameters()}
    return (config, None) if found == expected else (None, f"{kind} means other shapes by these sizes")


def _common(blocks: Mapping[str, BlockSizes]) -> BlockSizes | None:
    """What all blocks have that have it at all; None where they differ."""
    found = {}
    for name in (field.name for field in dataclasses.fields(BlockSizes)):
        sizes = {getattr(each, name) for each in blocks.values()} - {None}
        if len(sizes) > 1:
            return None
        found[name] = next(iter(sizes), None)
    return BlockSizes(**found)
