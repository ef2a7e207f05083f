"""Physically smaller models: which rows and columns a file leaves out, and the config that says so.

A model whose layers all lost the same number of heads and neurons is an ordinary model of smaller sizes,
where its config can say so. Otherwise the folder keeps the sizes of the original in `config.json`, and
`dsee_structure.json` tells `load_pretrained` what each block really has.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.families import Family, Part, family_of, find_blocks, find_units, inner
from dsee_scale.adapters.matrices import ShapeOf
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.files import damaged
from dsee_scale.checkpoint.folder import FORMAT_VERSION
from dsee_scale.checkpoint.pretrained import reject_endless
from dsee_scale.checkpoint.record import is_adapter_key
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import FormatError

STRUCTURE_FILE = "dsee_structure.json"


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What one transformer block has."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_size: int
    """Outputs of one head."""
    neurons: int
    """Feed-forward neurons."""

    def size(self, what: str) -> int:
        """One of the fields, or `width`, the size of all query heads together."""
        return self.heads * self.head_size if what == "width" else getattr(self, what)


@dataclass(frozen=True)
class Structure:
    """What is left of a model's heads and neurons.

    Attributes:
        blocks: sizes by name of the block.
        whole: sizes of the blocks before anything was removed.
        kept: parameter's name -> (axis, indices that stay), for parameters that get smaller.
        num_removed: entries of all parameters that are cut out.
    """

    blocks: dict[str, BlockSizes]
    whole: dict[str, BlockSizes]
    kept: dict[str, tuple[int, Tensor]]
    num_removed: int

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's shape in the files."""
        if name not in self.kept:
            return shape
        axis, indices = self.kept[name]
        return tuple(len(indices) if i == axis else size for i, size in enumerate(shape))

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter without what was removed."""
        if name not in self.kept:
            return tensor
        axis, indices = self.kept[name]
        return tensor.index_select(axis, indices.to(tensor.device))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        blocks = {name: dataclasses.asdict(sizes) for name, sizes in self.blocks.items()}
        return {"version": FORMAT_VERSION, "blocks": blocks}

    def summary(self) -> str:
        """One line for people."""
        parts = []
        for what in ("heads", "neurons"):
            left = sum(sizes.size(what) for sizes in self.blocks.values())
            total = sum(sizes.size(what) for sizes in self.whole.values())
            if left < total:
                parts.append(f"{total - left:,} of {total:,} {what}")
        blocks = f"{len(self.blocks)} blocks"
        return f"{' and '.join(parts)} cut out of {blocks}: {self.num_removed:,} parameters fewer"


def find_structure(model: nn.Module, shape_of: ShapeOf) -> Structure | None:
    """What the record of a model's prunings leaves of it; None where no head or neuron was removed. Local.

    Raises:
        FormatError: the record does not fit the model.
    """
    if not any(
        kind in prune_info for prune_info in model_state(model).pruned.values() for kind in UNIT_PATTERNS
    ):
        return None
    kept: dict[str, tuple[int, Tensor]] = {}
    num_removed = 0
    left: dict[str, dict[str, int]] = {}
    whole: dict[str, dict[str, int]] = {}
    for kind in UNIT_PATTERNS:
        for layer in find_units(model, kind, shape_of):  # type: ignore[arg-type]
            gone = removed_units(model, layer)
            for part in layer.parts if gone.any() else ():
                lines = gone[part.unit_of]
                kept |= _kept_lines(part, (~lines).nonzero().flatten())
                num_removed += int(lines.sum()) * (part.matrix.shape[1 - part.axis] + part.has_unit_bias)
            for sizes, num_units in ((left, int((~gone).sum())), (whole, layer.num_units)):
                found = sizes.setdefault(layer.name, {})
                if kind == "heads":
                    found |= {"heads": num_units * layer.unit_size, "kv_heads": num_units}
                    found["head_size"] = layer.head_size
                else:
                    found["neurons"] = num_units
    return Structure(
        {name: BlockSizes(**sizes) for name, sizes in left.items()},
        {name: BlockSizes(**sizes) for name, sizes in whole.items()},
        kept,
        num_removed,
    )


def recorded_model(
    identity: Mapping[str, Any], pruned: Mapping[str, dict[str, Any]], where: str
) -> nn.Module:
    """The architecture that a saved record describes, without weights, with its prunings noted on it. Local.

    Args:
        identity: `base_model` of the record.
        pruned: how each weight was pruned.
        where: file, for errors.

    Raises:
        FormatError: the record does not say enough, or transformers does not know the class.
    """
    import transformers

    stock: Any = getattr(transformers, str(identity.get("class")), None)
    if stock is None or not identity.get("full_config"):
        raise FormatError(
            f"{where} holds no config of a class that transformers knows ({identity.get('class')}), so what "
            "was removed cannot be cut out; load the base, load_adapter, and export_model, or use "
            "delta 'separate'"
        )
    reject_endless(identity["full_config"], where)
    with damaged(where), torch.device("meta"):
        model = stock(stock.config_class.from_dict(dict(identity["full_config"])))
    model_state(model).pruned.update(pruned)
    return model


def smaller_config(model: Any, structure: Structure, shape_of: ShapeOf) -> tuple[Any | None, str | None]:
    """A config with which the stock class has exactly the tensors of the files. Local.

    Returns:
        The config and None, or None and why there is none.
    """
    family = family_of(model)
    sizes = list(structure.blocks.values())
    kind = type(model.config).__name__
    if any(other != sizes[0] for other in sizes):
        return None, f"its blocks are not alike, which {kind} cannot say"
    values = model.config.to_dict() | {family.neuron_key: sizes[0].neurons}
    if sizes[0].heads != next(iter(structure.whole.values())).heads:
        if not family.head_keys:
            return None, f"{kind} cannot say a number of heads apart from the hidden size"
        values |= {key: sizes[0].size(what) for key, what in family.head_keys.items()}
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


def read_structure(values: Mapping[str, Any], where: str) -> dict[str, BlockSizes]:
    """Block sizes from `dsee_structure.json`.

    Raises:
        FormatError: an unknown version, or values that make no sense.
    """
    if values.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{where} has format version {values.get('version')!r}, expected {FORMAT_VERSION}; use the "
            "dsee_scale that wrote it"
        )
    names = {field.name for field in dataclasses.fields(BlockSizes)}
    try:
        blocks = {name: BlockSizes(**sizes) for name, sizes in values["blocks"].items()}
        sound = all(sizes.size(name) >= 1 for sizes in blocks.values() for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where} is damaged: {error}; use another copy of it") from error
    if not blocks or not sound:
        raise FormatError(f"{where} is damaged: expected positive sizes for every block")
    return blocks


def resize_blocks(model: nn.Module, blocks: Mapping[str, BlockSizes], where: str) -> None:
    """Give a freshly made model the sizes of its files; the values of the weights are not kept. Local.

    Raises:
        FormatError: the blocks are not those of this model.
    """
    family = family_of(model)
    found = find_blocks(model, family)
    if set(found) != set(blocks):
        raise FormatError(
            f"{where} and the model differ in blocks {', '.join(sorted(set(blocks) ^ set(found))[:3])}; "
            "the folder was put together from different models"
        )
    for name, block in found.items():
        _resize(block, name, family, blocks[name])


def _resize(block: nn.Module, name: str, family: Family, sizes: BlockSizes) -> None:
    width, kv_width = sizes.size("width"), sizes.kv_heads * sizes.head_size
    fused = len(family.qkv) == 1
    outputs = (3 * width,) if fused else (width, kv_width, kv_width)
    for path, size in zip(family.qkv, outputs, strict=True):
        _set_size(inner(block, path, name), outputs=size)
    _set_size(inner(block, family.o, name), inputs=width)
    for path in family.up:
        _set_size(inner(block, path, name), outputs=sizes.neurons)
    _set_size(inner(block, family.down, name), inputs=sizes.neurons)
    for path, what in family.head_attributes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(inner(block, owner, name) if owner else block, attribute, sizes.size(what))


def _set_size(module: Any, *, outputs: int | None = None, inputs: int | None = None) -> None:
    """Make a Linear's or Conv1D's parameters anew, of other sizes, where and what they were."""
    transposed = not isinstance(module, nn.Linear)
    old_outputs, old_inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    shape = (outputs or old_outputs, inputs or old_inputs)
    if shape == (old_outputs, old_inputs):
        return
    module.weight = _like(module.weight, shape[::-1] if transposed else shape)
    if outputs and module.bias is not None:
        module.bias = _like(module.bias, (outputs,))
    if transposed:
        module.nx, module.nf = shape[1], shape[0]
    else:
        module.in_features, module.out_features = shape[1], shape[0]


def _like(param: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(param.new_empty(shape), requires_grad=param.requires_grad)


def _kept_lines(part: Part, indices: Tensor) -> dict[str, tuple[int, Tensor]]:
    lines = {part.matrix.param_name: (part.axis, indices)}
    return lines | ({part.matrix.bias_name: (0, indices)} if part.has_unit_bias else {})
