"""The output ranges of a fused projection that `output_slices` names."""

from __future__ import annotations

import itertools
import re

from dsee_scale.errors import ConfigError

PARTS = ("q", "k", "v")
FUSED = "attn.c_attn"
"""The Conv1D layer whose outputs are q, k and v in equal thirds, in GPT-2 and its kin. Others have them head by head
(GPT-NeoX, BLOOM, Falcon), in unequal parts (Phi-3), or no q at all (GPT-2's `crossattention.c_attn`)."""


def parse_slices(
    name: str, outputs: int, parts: tuple[str, ...], *, conv1d: bool
) -> tuple[tuple[int, int], ...]:
    """The ranges (start, stop), ascending.

    Args:
        name: the module's.
        outputs: how many it has.
        parts: "q", "k", "v" or "start:stop".
        conv1d: whether it is transformers' Conv1D.

    Raises:
        ConfigError: a part that is none, one that this layer is not known to have, or parts that overlap.
    """
    in_thirds = conv1d and f".{name}".endswith(f".{FUSED}") and outputs % 3 == 0
    ranges = sorted(_parse_slice(name, outputs, part, in_thirds) for part in parts)
    if not ranges:
        raise ConfigError(f"output_slices for {name} is empty; leave the key out to adapt the whole matrix")
    for (_, stop), (start, _) in itertools.pairwise(ranges):
        if start < stop:
            raise ConfigError(f"output_slices for {name} overlap: {ranges}")
    return tuple(ranges)


def _parse_slice(name: str, outputs: int, part: str, in_thirds: bool) -> tuple[int, int]:
    if part in PARTS:
        if not in_thirds:
            raise ConfigError(
                f"output_slices {part!r} for {name}: expected GPT-2's {FUSED} (Conv1D), whose outputs are q, k and v "
                "in equal thirds; other layers have them head by head or in unequal parts. Give ranges of its "
                f'{outputs} outputs as "start:stop", the way its forward splits them'
            )
        width, index = outputs // 3, PARTS.index(part)
        return index * width, (index + 1) * width
    found = re.fullmatch(r"(\d+):(\d+)", part)
    if not found or not 0 <= int(found[1]) < int(found[2]) <= outputs:
        raise ConfigError(
            f'output_slices {part!r} for {name}: expected "q", "k", "v" or "start:stop" within 0:{outputs}'
        )
    return int(found[1]), int(found[2])
