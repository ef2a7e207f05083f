"""What a computation cannot be faster than on a GPU: its bytes over the memory's rate, its FLOPs over the units'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

BYTES_PER_SECOND = {"H200": 4.8e12, "H100": 3.35e12}
"""By a part of the card's name; of another card, and of a dry run, an H100's."""
FLOPS_PER_SECOND = 989e12
"""Dense, in bfloat16; of both."""


def floor(*, bytes_moved: float = 0, flops: float = 0) -> float:
    """Seconds."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    rate = next((rate for name, rate in BYTES_PER_SECOND.items() if name in card), BYTES_PER_SECOND["H100"])
    return max(bytes_moved / rate, flops / FLOPS_PER_SECOND)


def frozen_flops(config: Any, sequences: int, length: int, *, forward_only: bool = False) -> float:
    """FLOPs of a step of a frozen Llama: forward, forward again of what was checkpointed, gradients of activations.

    The forward pass of a block is done again up to its last product, whose output nobody needs.

    Args:
        config: of transformers.
        sequences: of a batch.
        length: tokens of each, of which causal attention looks at half the pairs.
        forward_only: the forward pass alone, with the logits of each sequence's last token.
    """
    tokens = sequences * length
    blocks = config.num_hidden_layers * sum(map(math.prod, matrices(config)))
    last = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    attention = 2 * tokens * length * config.hidden_size * config.num_hidden_layers
    if forward_only:
        return 2 * (tokens * blocks + sequences * head) + attention
    return 2 * tokens * (3 * blocks - last + 2 * head) + 4 * attention


def adapter_flops(sizes: Iterable[tuple[int, int]], rank: int, tokens: int) -> float:
    """FLOPs of low-rank updates: forward, again, gradients of activations and of A and B."""
    return sum(8 * tokens * rank * (outputs + inputs) for outputs, inputs in sizes)


def masked_flops(sizes: Iterable[tuple[int, int]], rank: int, tokens: int) -> float:
    """FLOPs that training under the mask adds: the update formed three times, and its whole gradient once."""
    return sum(outputs * inputs * (2 * tokens + 6 * rank + 4 * rank) for outputs, inputs in sizes)


def step_floors(
    config: Any, targets: Iterable[str], rank: int, sequences: int, length: int
) -> dict[str, float]:
    """Seconds of checkpointed steps: of the frozen model, ours, ours under the mask, and what adapters add.

    Where adapters are trained nobody may need the gradient of the first block's input.
    """
    sizes = [size for name, size in zip(LINEARS, matrices(config), strict=True) if name in targets]
    flops = frozen_flops(config, sequences, length)
    added = config.num_hidden_layers * adapter_flops(sizes, rank, sequences * length)
    masked = config.num_hidden_layers * masked_flops(sizes, rank, sequences * length)
    rest = flops - 2 * sequences * length * sum(math.prod(matrices(config)[k]) for k in (0, 2, 3))
    each = {"frozen": flops, "ours": rest + added, "masked": rest + masked, "added": added}
    return {side: floor(flops=count) for side, count in each.items()}


LINEARS = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
"""In the order of `matrices`."""


def matrices(config: Any) -> list[tuple[int, int]]:
    """(outputs, inputs) of a Llama block's linear layers."""
    hidden, width = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    return [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2 + [(width, hidden)] * 2 + [(hidden, width)]


def linear_entries(config: Any, kind: str = "") -> int:
    """Entries of the blocks' linear layers; where "heads" are pruned of q, k, v and o, "neurons" of the others."""
    sizes = matrices(config)
    touched = {"heads": sizes[:4], "neurons": sizes[4:]}.get(kind, sizes)
    return config.num_hidden_layers * sum(map(math.prod, touched))


def prune_bytes(config: Any, kind: str) -> float:
    """Bytes of a pruning of half of a bfloat16 model: each entry read once; all written, of units those that go."""
    return (3 if kind in ("heads", "neurons") else 4) * linear_entries(config, kind)


def residual_bytes(tokens: int, rows: int, columns: int, width: int) -> float:
    """Bytes of y += x S2^T and both gradients: x's columns twice, y's and dy's rows, dx's columns; in and out.

    Args:
        tokens: T.
        rows: distinct rows of S2's entries.
        columns: distinct columns.
        width: bytes of an entry.
    """
    return tokens * width * (2 * columns + 2 * rows + rows + 2 * columns)
