"""What both ports share: the processes that hold a model together, and quantised weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsee_scale.distributed import communication_device, raise_first
from dsee_scale.partition.quantized import Codec, find_codecs


class Ranks:
    """A group of processes, or the only one where torch.distributed is not initialised."""

    def __init__(self, model: nn.Module, group: Any, device: torch.device) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if self.active else 0
        self.world_size = dist.get_world_size(group) if self.active else 1
        self.device = communication_device(group, device) if self.active else device
        self.codecs: Mapping[int, Codec] = find_codecs(model)

    def dtype(self, param: nn.Parameter) -> torch.dtype:
        """Dtype of shards and whole copies: of a quantised weight, that of its decoded entries."""
        codec = self.codecs.get(id(param))
        return param.dtype if codec is None else codec.dtype

    def decode(self, param: nn.Parameter, stored: Tensor) -> Tensor:
        """A whole stored weight in its true shape, decoded if it is quantised. Local."""
        codec = self.codecs.get(id(param))
        return stored if codec is None else codec.decode(stored)[0].view(codec.shape)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Collective. In-place broadcast from rank `src` of the group."""
        if self.world_size > 1:
            dist.broadcast(tensor, self.global_rank(src), group=self.group)
        return tensor

    def deal(self, pieces: Sequence[Tensor]) -> list[Tensor]:
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

    def barrier(self) -> None:
        """Collective. Wait for every rank."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def raise_together(self, error: Exception | None) -> None:
        """Collective. Raise the first rank's error on every rank; return if there is none."""
        raise_first(error, group=self.group)

    def global_rank(self, rank: int) -> int:
        """The rank among all processes of a rank of this group."""
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank
