"""What both ports share: the processes that hold a model together, and quantised weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsee_scale.distributed import communication_device, raise_first
from dsee_scale.errors import PartitionError
from dsee_scale.partition.port import Exchange, Part, Shard, part_of
from dsee_scale.partition.quantized import Codec, find_codecs


def stored_dtype(param: nn.Parameter) -> torch.dtype:
    """Dtype of a parameter's entries; of released ones of a leaf module DeepSpeed leaves an empty float32 tensor."""
    return getattr(param, "ds_tensor", param).dtype


class Ranks:
    """A group of processes, or the only one where torch.distributed is not initialised."""

    def __init__(self, model: nn.Module, group: Any, device: torch.device) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if self.active else 0
        self.world_size = dist.get_world_size(group) if self.active else 1
        self.device = communication_device(group, device) if self.active else device
        self.codecs: Mapping[int, Codec] = find_codecs(model)
        self.edited: set[int] = set()

    def dtype(self, param: nn.Parameter) -> torch.dtype:
        """Dtype of shards and whole copies: of a quantised weight, that of its decoded entries."""
        codec = self.codecs.get(id(param))
        return stored_dtype(param) if codec is None else codec.dtype

    def holder(self, param: nn.Parameter, part: Part) -> int | None:
        """See `Partition.holder`."""
        return None

    def decode(self, param: nn.Parameter, stored: Tensor) -> Tensor:
        """A whole stored weight in its true shape, decoded if it is quantised. Local."""
        codec = self.codecs.get(id(param))
        return stored if codec is None else codec.decode(stored)[0].view(codec.shape)

    def _stored(self, param: nn.Parameter) -> list[Shard]:
        """Every stretch of a weight that this rank stores, its shard first; what is made from them is dropped."""
        raise NotImplementedError

    @contextlib.contextmanager
    def edit(self, param: nn.Parameter) -> Iterator[list[Shard]]:
        """Every stored stretch of a weight, to write in place and alike; see `Partition.edit`. Local."""
        self.edited.add(id(param))
        stretches = self._stored(param)
        yield stretches
        for stretch in stretches:
            if stretch.codec is not None and stretch.codes is not None:
                stretch.codec.zero(stretch.codes, stretch.data)
            settle(stretch.data.device)

    def collect(self, params: Sequence[nn.Parameter], owners: Sequence[int]) -> dict[int, Tensor]:
        """Collective. The parameters that this rank owns, whole and decoded, by index."""
        size = self.exchange_bytes(params, owners)
        workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        whole = self.start_exchange(params, owners, workspace).wait()
        return {index: self.decode(params[index], stored) for index, stored in whole.items()}

    def exchange_bytes(
        self, params: Sequence[nn.Parameter], owners: Sequence[int], parts: Sequence[Part] | None = None
    ) -> int:
        """See `Partition.exchange_bytes`."""
        raise NotImplementedError

    def start_exchange(
        self,
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        workspace: Tensor,
        parts: Sequence[Part] | None = None,
    ) -> Exchange:
        """See `Partition.start_exchange`."""
        raise NotImplementedError

    def _reject_codecs(self, params: Sequence[nn.Parameter]) -> None:
        """Refuse to write values into quantised weights."""
        kinds = {self.codecs[id(param)].kind for param in params if id(param) in self.codecs}
        if kinds:
            raise PartitionError(
                f"new values cannot be written into {kinds.pop()} weights, whose scales are fixed; expected "
                "floating-point weights: load the model without quantisation"
            )

    def _broadcast_values(
        self,
        which: Sequence[int],
        params: Sequence[nn.Parameter],
        owners: Sequence[int],
        values: Mapping[int, Tensor],
        parts: Sequence[Part] | None,
    ) -> None:
        """Collective. Values of replicated weights from their owners to every rank, in place where possible."""
        for index in which:
            with self.edit(params[index]) as stretches:
                flat = part_of(stretches[-1].data, parts, index)
                if index in values:
                    flat.copy_(values[index].reshape(-1))
                self.broadcast(flat, owners[index])

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Collective. In-place broadcast from rank `src` of the group."""
        if self.world_size > 1:
            there = tensor.to(self.device)
            dist.broadcast(there, self.global_rank(src), group=self.group)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    def send_pieces(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Collective. One all-to-all of bytes whose sizes the ranks tell each other first."""
        if self.world_size == 1:
            return list(pieces)
        sizes = torch.tensor([piece.numel() for piece in pieces], device=self.device)
        coming = torch.empty_like(sizes)
        dist.all_to_all_single(coming, sizes, group=self.group)
        sent = torch.cat(list(pieces)).to(self.device)
        received = sent.new_empty(int(coming.sum()))
        dist.all_to_all_single(received, sent, coming.tolist(), sizes.tolist(), group=self.group)
        return list(received.cpu().split(coming.tolist()))

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Collective. The sum over all ranks, replicas included, bit for bit the same on all."""
        if self.world_size == 1:
            return tensor
        there = tensor.to(self.device, copy=True)
        dist.all_reduce(there, group=self.group)
        # Nothing promises that a reduction rounds alike everywhere, and masks must not differ.
        return self.broadcast(there, 0).to(tensor.device)

    def sum_to(self, tensor: Tensor, dst: int) -> Tensor | None:
        """Collective. The sum over all ranks on rank `dst`, in place where possible; None elsewhere."""
        if self.world_size == 1:
            return tensor
        there = tensor.to(self.device)
        dist.reduce(there, self.global_rank(dst), group=self.group)
        return there.to(tensor.device) if self.rank == dst else None

    def raise_first(self, error: Exception | None) -> None:
        """Collective. Raise the first rank's error on every rank; return if there is none."""
        raise_first(error, group=self.group)

    def global_rank(self, rank: int) -> int:
        """The rank among all processes of a rank of this group."""
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank


def settle(device: torch.device) -> None:
    """End an in-place edit: DeepSpeed gathers on streams of its own, which do not wait for the current one."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
