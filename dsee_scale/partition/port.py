"""How passes and checkpoints reach weights, whatever stores them: the protocol behind `open_partition`.

A weight's *flat order* is the row-major order of its true shape. A *shard* is a stretch of that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsee_scale.partition.quantized import Codec


@dataclass(frozen=True)
class Shard:
    """One stored stretch of a weight.

    Attributes:
        data: 1-D view of the stored values, valid entries only. Of a quantised weight, a decoded copy.
        start: position of `data[0]` in the weight's flat order.
        codes: the stored codes of a quantised weight.
        codec: how they are stored.
    """

    data: Tensor
    start: int
    codes: Tensor | None = None
    codec: Codec | None = None


def decoded(codec: Codec | None, stored: Tensor, start: int) -> Shard:
    """The shard of a stored stretch, flat, that begins `start` stored elements into the weight."""
    if codec is None:
        return Shard(stored, start)
    entries, first = codec.decode(stored, start)
    return Shard(entries, first, stored, codec)


def within(shard: Shard, offset: int, numel: int) -> Shard:
    """The part of a shard that lies in a matrix of `numel` entries at `offset`, as a shard of that matrix."""
    stop = shard.start + shard.data.numel()
    if not offset and stop <= numel:
        return shard  # with the codes of a quantised weight
    first = min(max(shard.start, offset), offset + numel)
    length = max(0, min(stop, offset + numel) - first)
    begin = max(0, first - shard.start)
    return Shard(shard.data[begin : begin + length], first - offset)


Part = tuple[int, int] | None
"""A stretch of a parameter's flat order, (start, numel), such as one expert's matrix; None for all of it."""


def part_of(whole: Tensor, parts: Sequence[Part] | None, index: int) -> Tensor:
    """A whole parameter, or the entries of its part in a row."""
    part = parts[index] if parts else None
    return whole if part is None else whole.reshape(-1)[part[0] : part[0] + part[1]]


class Exchange(Protocol):
    """A transfer of whole matrices to their owners that may still be under way."""

    def wait(self) -> dict[int, Tensor]:
        """The matrices that this rank owns, in their true shapes, by index into the call's list; parts as vectors."""


class Partition(Protocol):
    """One model's weights as this process sees them.

    `rank` and `world_size` are those of the processes that hold the model together; `codecs` says how quantised
    weights are stored, by the parameter's `id`; `replicated` whether every rank holds every weight, so that no forward
    pass waits for another rank; `edited` the `id` of each parameter that was written through this port. A method that
    communicates says "Collective." and must be entered by every rank in the same order.
    """

    rank: int
    world_size: int
    replicated: bool
    device: torch.device
    codecs: Mapping[int, Codec]
    edited: set[int]

    def shape(self, param: nn.Parameter) -> torch.Size:
        """True shape, whatever part of the parameter is here."""

    def dtype(self, param: nn.Parameter) -> torch.dtype:
        """Dtype of shards and whole copies: the parameter's own, or that of a quantised weight decoded."""

    def compute_device(self, param: nn.Parameter) -> torch.device:
        """Where the weight is when it is used, and so where its adapter belongs; not where it is offloaded."""

    def shard(self, param: nn.Parameter) -> Shard:
        """This rank's stretch, to read. Over all ranks that reduce together each entry appears exactly once."""

    def edit(self, param: nn.Parameter) -> AbstractContextManager[list[Shard]]:
        """Every stretch of a weight that this rank stores, to write in place and alike. Local.

            with partition.edit(param) as stretches:
                for stretch in stretches:
                    stretch.data[...] = 0

        The first one is `shard`. Copies that are made from it (whole weights that stayed resident, secondary
        shards of hierarchical partitioning) are dropped on entering and made anew at the next use, so none can
        go stale. On leaving, zeros in a decoded copy are written into the codes of a quantised weight (other
        values cannot be), and what follows on any stream of an accelerator sees the edit.
        """

    def writable(self, name: str, param: nn.Parameter) -> None:
        """Raise PartitionError if writing to this weight would not last or is not possible. Local."""

    def gather(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Collective. Whole copies of (small) parameters on every rank; extra memory: their sizes."""

    def held_bytes(self, module: nn.Module) -> int:
        """Extra memory of `hold`. Local, the same on every rank."""

    def hold(self, module: nn.Module) -> AbstractContextManager[None]:
        """Collective at its begin. A context in which a module's weights stay whole on every rank.

        Its forward and backward passes fetch nothing then, but for modules that are leaves of ZeRO-3. Shards must not
        be edited inside.
        """

    def gather_each(self, params: Sequence[nn.Parameter], dst: int = 0) -> Iterator[Tensor | None]:
        """Collective. Stream whole parameters to rank `dst` one at a time, None elsewhere.

        Extra memory: on `dst` one whole parameter, elsewhere nothing beyond a shard. A yielded tensor may
        alias the model's own storage: read it, do not write to it.
        """

    def assign(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Collective. Set (small) trainable parameters from whole values that every rank holds."""

    def holder(self, param: nn.Parameter, part: Part) -> int | None:
        """Local. The rank in whose shard a part of a parameter begins; None where it is whole, or on every rank."""

    def exchange_bytes(
        self, params: Sequence[nn.Parameter], owners: Sequence[int], parts: Sequence[Part] | None = None
    ) -> int:
        """Size of the workspace that `start_exchange` needs on this rank. Local."""

    def start_exchange(
        self,
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        workspace: Tensor,
        parts: Sequence[Part] | None = None,
    ) -> Exchange:
        """Collective. Begin to send each matrix to the rank that owns it; nobody else gets it.

        A matrix is a whole parameter, or the part of it that `parts` says.

        `workspace` (uint8, at least `exchange_bytes`, on `device`) holds what is sent and received, so that
        a rank without memory finds out before any rank waits for it. It is free again once the matrices
        that `wait` returned are: they may be views of it. Quantised matrices arrive as they are stored;
        `decode` makes entries of one.
        """

    def collect(self, params: Sequence[nn.Parameter], owners: Sequence[int]) -> dict[int, Tensor]:
        """Collective. The parameters that this rank owns, whole and decoded, by index; nobody else gets them.

        One exchange, for many small parameters such as adapters. Extra memory: `exchange_bytes`. A tensor may
        alias the model's own storage: read it, do not write to it.
        """

    def scatter(
        self,
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        values: Mapping[int, Tensor],
        workspace: Tensor | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Collective. The way back of an exchange: owners hold whole new values, which go into every rank's shard.

        One all-to-all; no rank but the owner ever holds a whole matrix. Where weights are replicas the owner
        broadcasts them one by one, in place. Extra memory: `exchange_bytes`, which `workspace` may provide.

        Args:
            params: frozen weights, not quantised.
            owners: the rank that brings each one's values.
            values: by index into `params`, exactly those that this rank owns; true shapes, any dtype and device.
            workspace, parts: as in `start_exchange`.

        Raises:
            PartitionError: a quantised weight, the same on every rank.
        """

    def decode(self, param: nn.Parameter, stored: Tensor) -> Tensor:
        """A whole stored weight in its true shape, decoded if it is quantised. Local."""

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Collective. In-place sum over the ranks whose shards are different; identity on replicas."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Collective. The sum over all ranks, replicas included; the same on all, `tensor` stays as it is."""

    def sum_to(self, tensor: Tensor, dst: int) -> Tensor | None:
        """Collective. The sum over all ranks, replicas included, on rank `dst`; None elsewhere.

        It may take the place of `tensor`, whose values are lost.
        """

    def send_pieces(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Collective. Send piece r, made from this rank's shards, to rank r.

        Args:
            pieces: for each rank, (n,) uint8 on the CPU.

        Returns:
            On the CPU, what came from the ranks whose shards are different, in their order.
        """

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Collective. In-place broadcast of `tensor` from rank `src` to all ranks."""

    def raise_first(self, error: Exception | None) -> None:
        """Collective. If any rank brings an error, every rank raises the first rank's one."""
