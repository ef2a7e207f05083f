"""Whole weights: one process, DDP, ZeRO-1, ZeRO-2. The twin that partitioned algorithms are tested against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.errors import PartitionError
from dsee_scale.partition.port import Part, Shard, decoded, part_of
from dsee_scale.partition.ranks import Ranks


class DensePartition(Ranks):
    """Every rank holds every weight, so a shard is the whole weight and nothing is reduced."""

    replicated = True

    def __init__(self, model: nn.Module) -> None:
        first = next(model.parameters(), None)
        super().__init__(model, None, first.device if first is not None else torch.device("cpu"))

    def shape(self, param: nn.Parameter) -> torch.Size:
        """True shape."""
        codec = self.codecs.get(id(param))
        return param.shape if codec is None else codec.shape

    def compute_device(self, param: nn.Parameter) -> torch.device:
        """The weight's own device."""
        return param.device

    def shard(self, param: nn.Parameter) -> Shard:
        """The whole weight, flat."""
        return decoded(self.codecs.get(id(param)), param.data.view(-1), 0)

    def _stored(self, param: nn.Parameter) -> list[Shard]:
        """The whole weight: each rank's replica is its own shard."""
        return [self.shard(param)]

    def writable(self, name: str, param: nn.Parameter) -> None:
        """Raise PartitionError for storage that has no flat view."""
        if param.is_meta:
            raise PartitionError(f"{name} is on the meta device; load its weights first")
        if not param.data.is_contiguous():
            raise PartitionError(
                f"{name} of shape {tuple(param.shape)} is not contiguous; "
                "assign `param.data = param.data.contiguous()` first"
            )

    def gather(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """The parameters themselves, detached."""
        return [self.decode(param, param.detach()) for param in params]

    def held_bytes(self, module: nn.Module) -> int:
        """None: every weight is here."""
        return 0

    def hold(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def gather_each(self, params: Sequence[nn.Parameter], dst: int = 0) -> Iterator[Tensor | None]:
        """The parameters one by one on rank `dst`, None elsewhere; nothing is sent."""
        for param in params:
            yield self.decode(param, param.detach()) if self.rank == dst else None

    def assign(self, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Copy whole values in."""
        for param, value in zip(params, values, strict=True):
            with self.edit(param) as stretches:
                stretches[0].data.copy_(value.reshape(-1))

    def exchange_bytes(
        self, params: Sequence[nn.Parameter], owners: Sequence[int], parts: Sequence[Part] | None = None
    ) -> int:
        """None: nothing travels."""
        return 0

    def start_exchange(
        self,
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        workspace: Tensor,
        parts: Sequence[Part] | None = None,
    ) -> Owned:
        """The owned matrices are already here."""
        owned = [i for i, owner in enumerate(owners) if owner == self.rank]
        return Owned({i: part_of(params[i].detach(), parts, i) for i in owned})

    def scatter(
        self,
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        values: Mapping[int, Tensor],
        workspace: Tensor | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Collective. Each owner broadcasts its weights one by one, in place."""
        self._reject_codecs(params)
        self._broadcast_values(range(len(params)), params, owners, values, parts)

    def send_pieces(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """This rank's own piece alone: the other ranks would send the same."""
        return [pieces[self.rank]]

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Identity: every rank has counted every weight."""
        return tensor


class Owned:
    """A finished exchange."""

    def __init__(self, matrices: dict[int, Tensor]) -> None:
        self.matrices = matrices

    def wait(self) -> dict[int, Tensor]:
        """The owned matrices by index."""
        return self.matrices
