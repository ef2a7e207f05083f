"""A freshly made model given the sizes of a folder whose config can't say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsee_scale.adapters.families import Experts, Family, family_of, find_blocks, inner
from dsee_scale.adapters.matrices import expert_layout
from dsee_scale.adapters.routers import router_tensors
from dsee_scale.checkpoint.folder import FORMAT_VERSION
from dsee_scale.errors import FormatError
from dsee_scale.export.structure import BlockSizes

HEADS = {"heads", "kv_heads", "head_size"}


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
    try:
        blocks = {name: BlockSizes(**sizes) for name, sizes in values["blocks"].items()}
        sound = all(sizes and min(sizes.values()) >= 1 for sizes in values["blocks"].values())
        if any(len(HEADS & set(sizes)) not in (0, len(HEADS)) for sizes in values["blocks"].values()):
            raise KeyError(f"expected {', '.join(sorted(HEADS))} together")
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
    other = set(blocks) - set(found) if family.experts else set(blocks) ^ set(found)
    if other:
        raise FormatError(
            f"{where} and the model differ in blocks {', '.join(sorted(other)[:3])}; "
            "the folder was put together from different models"
        )
    for name, sizes in blocks.items():
        if family.experts:
            _resize_experts(found[name], name, family.experts, sizes)
        else:
            _resize_neurons(found[name], name, family, sizes)
        if sizes.heads is not None:
            _resize_heads(found[name], name, family, sizes)


def _resize_heads(block: nn.Module, name: str, family: Family, sizes: BlockSizes) -> None:
    width, kv_width = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size  # type: ignore[operator]
    fused = len(family.qkv) == 1
    outputs = (3 * width,) if fused else (width, kv_width, kv_width)
    for path, size in zip(family.qkv, outputs, strict=True):
        _set_size(inner(block, path, name), outputs=size)
    _set_size(inner(block, family.o, name), inputs=width)
    for path, what in family.head_attributes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(inner(block, owner, name) if owner else block, attribute, sizes.size(what))


def _resize_neurons(block: nn.Module, name: str, family: Family, sizes: BlockSizes) -> None:
    for path in family.up:
        _set_size(inner(block, path, name), outputs=sizes.neurons)
    _set_size(inner(block, family.down, name), inputs=sizes.neurons)


def _resize_experts(block: nn.Module, name: str, where: Experts, sizes: BlockSizes) -> None:
    """Fewer experts, or smaller ones; their router has a row for each."""
    module, router = inner(block, where.path, name), inner(block, where.router, name)
    layout = expert_layout(module)
    assert layout is not None
    old = len(getattr(module, layout.up))
    experts = sizes.experts or old
    if sizes.neurons is not None:
        outputs, axis = sizes.neurons * (2 if layout.gated else 1), 2 if layout.transposed else 1
        _set_length(module, layout.up, axis, outputs)
        _set_length(module, layout.down, 3 - axis, sizes.neurons)
        if layout.bias:
            _set_length(module, f"{layout.up}_bias", 1, outputs)
    names = [layout.up, layout.down]
    names += [f"{each}_bias" for each in names] if layout.bias else []
    for attribute in names:
        _set_length(module, attribute, 0, experts)
    for attribute in router_tensors(router, old, lambda param: param.shape):
        _set_length(router, attribute, 0, experts)
    module.num_experts = router.num_experts = experts


def _set_length(module: Any, attribute: str, axis: int, length: int) -> None:
    """Make a parameter or buffer anew, of another length along an axis."""
    tensor = getattr(module, attribute)
    shape = tuple(length if i == axis else size for i, size in enumerate(tensor.shape))
    made = _like(tensor, shape) if isinstance(tensor, nn.Parameter) else tensor.new_empty(shape)
    setattr(module, attribute, made)


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
