"""Which heads and neurons are gone: part of the record of pruned weights, which every checkpoint holds.

Each weight and bias of a layer carries under `heads` or `neurons` a hexadecimal number, one bit for each
unit, the first unit first, 1 for a removed one.
"""

from __future__ import annotations

from torch import Tensor, nn, tensor, zeros
from torch import bool as boolean

from dsee_scale.adapters.matrices import ShapeOf
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import UnitLayer, find_units
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import FormatError


def removed_units(model: nn.Module, layer: UnitLayer) -> Tensor:
    """(U,) bool, what was removed of one layer so far.

    Raises:
        FormatError: the record does not fit the layer.
    """
    name = layer.parts[0].matrix.param_name
    text = model_state(model).pruned.get(name, {}).get(layer.kind)
    return (
        zeros(layer.num_units, dtype=boolean) if text is None else unpack_units(text, layer.num_units, name)
    )


def removed_inputs(model: nn.Module, shape_of: ShapeOf) -> dict[str, Tensor]:
    """Matrices that lost inputs with their heads or neurons: module name -> (I,) bool, True where gone."""
    found: dict[str, Tensor] = {}
    for kind in UNIT_PATTERNS:
        if not any(kind in how for how in model_state(model).pruned.values()):
            continue
        for layer in find_units(model, kind, shape_of):  # type: ignore[arg-type]
            gone = removed_units(model, layer)
            found |= {part.name: gone[part.unit_of] for part in layer.parts if part.side == "inputs"}
    return {name: gone for name, gone in found.items() if gone.any()}


def record_removed(model: nn.Module, layer: UnitLayer, gone: Tensor) -> None:
    """Note what is removed of one layer, in all. A pattern within the weights stays noted."""
    pruned, packed = model_state(model).pruned, pack_units(gone)
    names = [
        name
        for part in layer.parts
        for name in [part.matrix.param_name] + ([part.matrix.bias_name] if part.has_unit_bias else [])
    ]
    for name in dict.fromkeys(names):
        pruned[name] = {"pattern": layer.kind, **pruned.get(name, {}), layer.kind: packed}


def pack_units(gone: Tensor) -> str:
    """Hexadecimal digits of (U,) bool."""
    bits = "".join("1" if unit else "0" for unit in gone.tolist())
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def unpack_units(text: str, num_units: int, name: str) -> Tensor:
    """(U,) bool of what `pack_units` gave.

    Raises:
        FormatError: not such digits, or for another number of units.
    """
    try:
        bits = f"{int(text, 16):0{4 * len(text)}b}"
    except (TypeError, ValueError):
        bits = ""
    if len(bits) - num_units not in range(4) or "1" in bits[num_units:]:
        raise FormatError(
            f"the record of {name} says {text!r}, expected one bit for each of {num_units} units"
        )
    return tensor([bit == "1" for bit in bits[:num_units]])
