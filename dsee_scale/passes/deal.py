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


def rounds(
    sizes: Sequence[int],
    owners: Sequence[int],
    world_size: int,
    max_bytes: int,
    holders: Sequence[int | None] | None = None,
) -> list[Round]:
    """Split into rounds in which each owner receives at most `max_bytes`, or one matrix.

    Args:
        sizes: bytes of each matrix.
        owners: the rank that receives it.
        world_size: number of ranks.
        max_bytes: what an owner receives in a round, or a holder sends.
        holders: the rank that holds most of it, as of an expert's matrix; None where each rank holds a share.
    """
    queues = [
        sorted((i for i, owner in enumerate(owners) if owner == r), key=lambda i: (-sizes[i], i))
        for r in range(world_size)
    ]
    result = []
    while any(queues):
        chosen: list[int] = []
        sent: dict[int | None, int] = {}
        for owner, queue in enumerate(queues):
            room, later = max_bytes, []
            for at, index in enumerate(queue):
                if sizes[queue[-1]] > room < max_bytes:  # not even the smallest
                    later += queue[at:]
                    break
                holder, size = (holders[index] if holders else None), sizes[index]
                sends = holder is None or not sent.get(holder) or sent[holder] + size <= max_bytes
                if sends and (room == max_bytes or size <= room):
                    room -= size
                    sent[holder] = sent.get(holder, 0) + size
                    chosen.append(index)
                else:
                    later.append(index)
            queues[owner] = later
        chosen.sort()
        result.append(Round(tuple(chosen), tuple(owners[i] for i in chosen)))
    return result
