"""Stretches of ZeRO-3's parameters on their way to the ranks that own them: one all-to-all of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsee_scale.partition.port import Part, part_of
from dsee_scale.partition.ranks import Ranks


def is_partitioned(param: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 manages this parameter."""
    return hasattr(param, "ds_id")


class AllToAll:
    """Matrices on their way to their owners: one `all_to_all_single` of bytes."""

    def __init__(
        self,
        partition: Ranks,
        params: Sequence[Any],
        owners: Sequence[int],
        workspace: Tensor,
        parts: Sequence[Part] | None,
    ) -> None:
        ranks = range(partition.world_size)
        self.pieces = pieces_of(params, parts)
        self.mine = [i for i in self.pieces if owners[i] == partition.rank]
        replicas = [i for i in range(len(params)) if owners[i] == partition.rank and i not in self.pieces]
        self.replicas = {i: part_of(params[i].detach(), parts, i) for i in replicas}
        sent, at = [0] * partition.world_size, 0
        for i in sorted(self.pieces, key=lambda i: owners[i]):
            stretch = self.pieces[i].on(partition.rank)
            workspace[at : at + stretch.numel()].copy_(stretch)
            at += stretch.numel()
            sent[owners[i]] += stretch.numel()
        self.outgoing = workspace[:at]
        self.received = [sum(self.pieces[i].bytes_on(r) for i in self.mine) for r in ranks]
        self.incoming = workspace[at : at + sum(self.received)]
        self.work = dist.all_to_all_single(
            self.incoming, self.outgoing, self.received, sent, group=partition.group, async_op=True
        )

    def wait(self) -> dict[int, Tensor]:
        """The owned matrices, in their true shapes, by index; of a part, its entries in a row."""
        self.work.wait()
        queues = list(self.incoming.split(self.received))
        found = dict(self.replicas)
        for i in self.mine:
            piece, stretches = self.pieces[i], []
            for rank, queue in enumerate(queues):
                size = piece.bytes_on(rank)
                stretches.append(queue[:size])
                queues[rank] = queue[size:]
            found[i] = piece.whole([stretch for stretch in stretches if stretch.numel()])
        return found


@dataclass(frozen=True, eq=False)
class Piece:
    """What is sent of one parameter: stored elements `start` to `stop`, all of them where `part` is None."""

    param: Any
    part: Part

    @property
    def bounds(self) -> tuple[int, int]:
        """Where it begins and ends in the flat order of the parameter."""
        start, numel = self.part or (0, int(self.param.ds_numel))
        return start, start + numel

    def within(self, rank: int) -> tuple[int, int]:
        """Where it begins and ends in a rank's shard."""
        first, valid = valid_stretch(self.param, rank)
        start, stop = self.bounds
        begin = min(max(start - first, 0), valid)
        return begin, max(begin, min(stop - first, valid))

    def bytes_on(self, rank: int) -> int:
        """What a rank has of it."""
        begin, end = self.within(rank)
        return (end - begin) * int(self.param.ds_tensor.element_size())

    def on(self, rank: int) -> Tensor:
        """The bytes that this rank has of it."""
        begin, end = self.within(rank)
        return self.param.ds_tensor.detach().view(-1)[begin:end].view(torch.uint8)

    def cut(self, value: Tensor, rank: int) -> Tensor:
        """A rank's stretch of new values for all of it, as they are stored."""
        begin, end = self.within(rank)
        start = valid_stretch(self.param, rank)[0] + begin - self.bounds[0]
        return value.detach().reshape(-1)[start : start + end - begin].to(self.param.ds_tensor.dtype)

    def whole(self, stretches: Sequence[Tensor]) -> Tensor:
        """Put together from what the ranks sent, in their order."""
        dtype = self.param.ds_tensor.dtype
        joined = stretches[0] if len(stretches) == 1 else torch.cat(list(stretches))
        if joined.storage_offset() % dtype.itemsize:
            joined = joined.clone()
        entries = joined.view(dtype)
        return entries.view(tuple(self.param.ds_shape)) if self.part is None else entries


def pieces_of(params: Sequence[Any], parts: Sequence[Part] | None) -> dict[int, Piece]:
    """What ZeRO-3 manages of the parameters, by index."""
    return {
        i: Piece(param, parts[i] if parts else None)
        for i, param in enumerate(params)
        if is_partitioned(param)
    }


def valid_stretch(param: Any, rank: int) -> tuple[int, int]:
    """Where a rank's shard begins in the flat order of what is stored, and its length without the padding."""
    stored = int(param.ds_tensor.numel())
    start = min(rank * stored, int(param.ds_numel))
    return start, min(stored, int(param.ds_numel) - start)
