"""Deal matrices out to ranks by cost, and group them into rounds of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """Matrices that travel together: indices into the caller's list, and the owner of each."""

    indices: tuple[int, ...]
    owners: tuple[int, ...]


def deal(costs: Sequence[int], world_size: int) -> list[int]:
    """Owner of each matrix: the largest first, each to the least loaded rank; ties by index and rank."""
    load = [0] * world_size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world_size), key=lambda r: (load[r], r))
        owners[index] = owner
        load[owner] += costs[index]
    return owners


def rounds(sizes: Sequence[int], owners: Sequence[int], world_size: int, max_bytes: int) -> list[Round]:
    """Split into rounds in which each owner receives at most `max_bytes` (at least one matrix)."""
    queues = [
        sorted((i for i, owner in enumerate(owners) if owner == r), key=lambda i: (-sizes[i], i))
        for r in range(world_size)
    ]
    result = []
    while any(queues):
        chosen: list[int] = []
        for queue in queues:
            room = max_bytes
            while queue and (room == max_bytes or sizes[queue[0]] <= room):
                room -= sizes[queue[0]]
                chosen.append(queue.pop(0))
        chosen.sort()
        result.append(Round(tuple(chosen), tuple(owners[i] for i in chosen)))
    return result
