"""Weights partitioned by DeepSpeed ZeRO-3: this file and `exchange.py` alone know how it stores a parameter.

Under ZeRO-3 a parameter has `ds_shape` and `ds_numel` (true sizes), `ds_tensor` (this rank's stretch, of
ceil(numel / world size) entries, whose unused tail on the last ranks is uninitialised), `ds_status`, and
under hierarchical partitioning (hpZ) `ds_secondary_tensor`, from which forward and backward gather while there
is one. An in-place edit of `ds_tensor` is what the next gather from it returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import PartitionError
from dsee_scale.partition.exchange import (
    AllToAll,
    Piece,
    is_partitioned,
    pieces_of,
    valid_stretch,
)
from dsee_scale.partition.port import Part, Shard, decoded
from dsee_scale.partition.ranks import Ranks

_HELD = -1
"""Stands among the modules that use a parameter, whose numbers DeepSpeed begins at 0, so that none frees it."""


def keep_experts_together(model: nn.Module) -> list[str]:
    """Local. Make modules whose experts are modules of their own leaves of ZeRO-3; their names.

    Which of the experts run depends on a rank's tokens, and ranks that fetch different ones wait for each other for
    good. The parameters of a leaf come together. DeepSpeed does so itself for three classes of transformers alone.
    Fused experts are one module and need none of it.
    """
    found = [
        name.rpartition(".")[0]
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        and isinstance(module, nn.ModuleList)
        and any(map(is_partitioned, module.parameters()))
    ]
    if found:
        from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

        for name in found:
            set_z3_leaf_module(model.get_submodule(name), True)
    return found


class Zero3Partition(Ranks):
    """Each rank holds one stretch of every weight.

    Parameters that ZeRO-3 does not manage (adapters between `inject` and `deepspeed.initialize`) are
    replicas: rank 0 counts them, and every rank writes them.
    """

    replicated = False

    def __init__(self, model: nn.Module) -> None:
        params: list[Any] = [p for p in model.parameters() if is_partitioned(p)]
        group = params[0].ds_process_group
        if any(p.ds_process_group is not group or hasattr(p, "comm") for p in params):  # MiCS sets `comm`
            raise PartitionError(
                "the parameters are partitioned over different process groups (MiCS or expert parallelism); "
                "expected one ZeRO-3 group for the whole model: train without MiCS and expert parallelism"
            )
        super().__init__(model, group, params[0].ds_tensor.device)
        self._optimizer = next((p._z3_optimizer for p in params if hasattr(p, "_z3_optimizer")), None)
        if self.world_size != dist.get_world_size():
            raise PartitionError(
                f"the parameters are partitioned over {self.world_size} of {dist.get_world_size()} processes "
                "(MiCS, tensor or pipeline parallelism); expected all of them: use plain ZeRO-3"
            )

    def shape(self, param: Any) -> torch.Size:
        """True shape."""
        codec = self.codecs.get(id(param))
        if codec is not None:
            return codec.shape
        return torch.Size(param.ds_shape) if is_partitioned(param) else param.shape

    def compute_device(self, param: Any) -> torch.device:
        """The accelerator, wherever the shard is offloaded to."""
        return self.device if is_partitioned(param) else param.device

    def holder(self, param: Any, part: Part) -> int | None:
        """The rank in whose shard a part begins."""
        return part[0] // int(param.ds_tensor.numel()) if part and is_partitioned(param) else None

    def shard(self, param: Any) -> Shard:
        """This rank's stretch, without the padding."""
        if not is_partitioned(param):
            flat = param.data.view(-1)
            return decoded(self.codecs.get(id(param)), flat if self.rank == 0 else flat[:0], 0)
        start, valid = valid_stretch(param, self.rank)
        return decoded(self.codecs.get(id(param)), param.ds_tensor.data.view(-1)[:valid], start)

    def _stored(self, param: Any) -> list[Shard]:
        """The shard alone: what DeepSpeed makes from it is dropped, as after a step of its own optimizer.

        A whole weight that is here (resident, or not released yet) is freed first: freeing one later would
        make the secondary shard of hierarchical partitioning anew from it. Where that shard is missing, the
        next gather takes the primary ones and makes it again. So is one that is still on its way: after a forward
        pass without a backward pass DeepSpeed has begun to fetch what the latter would need. Replicas on other ranks
        than 0 follow an empty shard.
        """
        if not is_partitioned(param):
            shard = self.shard(param)
            return [shard] if self.rank == 0 else [shard, Shard(param.data.view(-1), 0)]
        if param.ds_status.name == "INFLIGHT":
            if self._optimizer is None:
                raise PartitionError(
                    "a weight is still being fetched, and no optimizer of ZeRO-3 is there to wait for it; expected an "
                    "engine with an optimizer, or a model that has not run yet"
                )
            self._optimizer.empty_partition_cache()
        if param.ds_status.name == "AVAILABLE":
            param.partition()
        param.ds_secondary_tensor = None
        return [self.shard(param)]

    def writable(self, name: str, param: Any) -> None:
        """Raise PartitionError for storage that an in-place edit of the shard would not reach."""
        if not is_partitioned(param):
            return
        if getattr(param.ds_tensor, "final_location", None) is not None:
            raise PartitionError(
                f"{name} is offloaded to NVMe; expected GPU or CPU memory: "
                'set "offload_param": {"device": "cpu"} in the DeepSpeed config'
            )
        if hasattr(param.ds_tensor, "ds_quant_scale"):
            raise PartitionError(
                f"{name} is quantised by DeepSpeed (zero_quantized_nontrainable_weights); expected "
                "floating-point shards: turn that setting off in the DeepSpeed config"
            )

    def gather(self, params: Sequence[Any]) -> list[Tensor]:
        """Collective. Whole copies on every rank, all in one transfer."""
        managed = [p for p in params if is_partitioned(p)]
        whole = iter(self._all_gather(managed))
        return [self.decode(p, next(whole) if is_partitioned(p) else p.detach()) for p in params]

    def held_bytes(self, module: nn.Module) -> int:
        """What `hold` adds on this rank."""
        return sum(p.ds_numel * p.ds_tensor.element_size() for p in _holdable(module))

    @contextlib.contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Collective at its begin. Frees what no module uses at the end."""
        params = _holdable(module)
        _fetch([param for param in params if param.ds_status.name == "NOT_AVAILABLE"])
        for param in params:
            param.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for param in params:
                param.ds_active_sub_modules.discard(_HELD)
                if param.ds_status.name == "AVAILABLE" and not param.ds_active_sub_modules:
                    param.partition()

    def gather_each(self, params: Sequence[Any], dst: int = 0) -> Iterator[Tensor | None]:
        """Collective. One whole parameter at a time on rank `dst`, None elsewhere."""
        for param in params:
            if is_partitioned(param):
                yield self._gather_to(param, dst)
            else:
                yield self.decode(param, param.detach()) if self.rank == dst else None

    def _gather_to(self, param: Any, dst: int) -> Tensor | None:
        """Collective. One whole parameter on rank `dst`, None elsewhere.

        Through an all-to-all in which everyone sends to one rank: gloo's gather takes a second whole copy there.
        """
        piece, here = self._sendable(param).view(torch.uint8), self.rank == dst
        sent = [piece.numel() if rank == dst else 0 for rank in range(self.world_size)]
        coming = [piece.numel() if here else 0] * self.world_size
        whole = piece.new_empty(sum(coming))
        dist.all_to_all_single(whole, piece, coming, sent, group=self.group)
        return self.decode(param, self._true(param, whole.view(param.ds_tensor.dtype))) if here else None

    def assign(self, params: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Write this rank's part of whole values that every rank holds."""
        for param, value in zip(params, values, strict=True):
            flat = value.reshape(-1)
            with self.edit(param) as stretches:
                for stretch in stretches:
                    stretch.data.copy_(flat[stretch.start : stretch.start + stretch.data.numel()])

    def exchange_bytes(
        self, params: Sequence[Any], owners: Sequence[int], parts: Sequence[Part] | None = None
    ) -> int:
        """This rank's stretches of all matrices, and everyone's of the matrices that it owns."""
        pieces = pieces_of(params, parts)
        sent = sum(piece.bytes_on(self.rank) for piece in pieces.values())
        owned = [piece for i, piece in pieces.items() if owners[i] == self.rank]
        return sent + sum(piece.bytes_on(r) for piece in owned for r in range(self.world_size))

    def start_exchange(
        self,
        params: Sequence[Any],
        owners: Sequence[int],
        workspace: Tensor,
        parts: Sequence[Part] | None = None,
    ) -> AllToAll:
        """Collective. Begin one all-to-all in which each owner gets the stretches of its matrices."""
        return AllToAll(self, params, owners, workspace, parts)

    def scatter(
        self,
        params: Sequence[Any],
        owners: Sequence[int],
        values: Mapping[int, Tensor],
        workspace: Tensor | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Collective. Owners send each rank its stretches of their matrices' new values, in one all-to-all."""
        self._reject_codecs(params)
        pieces = pieces_of(params, parts)
        if pieces:
            if workspace is None:
                size = self.exchange_bytes(params, owners, parts)
                workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._scatter_pieces(pieces, owners, values, workspace)
        replicas = [i for i in range(len(params)) if i not in pieces]
        self._broadcast_values(replicas, params, owners, values, parts)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Collective. In-place sum over all ranks."""
        there = tensor.to(self.device)
        dist.all_reduce(there, group=self.group)
        return tensor.copy_(there) if there is not tensor else tensor

    def _scatter_pieces(
        self,
        pieces: Mapping[int, Piece],
        owners: Sequence[int],
        values: Mapping[int, Tensor],
        workspace: Tensor,
    ) -> None:
        order = sorted(pieces, key=lambda i: owners[i])  # what comes from rank 0, from rank 1, ...
        at, sent = 0, [0] * self.world_size
        with raise_on_all_ranks(self):  # a copy in another dtype or on another device takes memory
            for rank in range(self.world_size):
                for piece, value in ((pieces[i], values[i]) for i in order if owners[i] == self.rank):
                    stretch = piece.cut(value, rank).to(self.device).view(torch.uint8)
                    workspace[at : at + stretch.numel()].copy_(stretch)
                    at += stretch.numel()
                    sent[rank] += stretch.numel()
        coming = [0] * self.world_size
        for i in order:
            coming[owners[i]] += pieces[i].bytes_on(self.rank)
        incoming = workspace[at:][: sum(coming)]
        dist.all_to_all_single(incoming, workspace[:at], coming, sent, group=self.group)
        at = 0
        for i in order:
            begin, end = pieces[i].within(self.rank)
            with self.edit(pieces[i].param) as (shard,):
                target = shard.data[begin:end].view(torch.uint8)
                target.copy_(incoming[at : at + target.numel()])
            at += target.numel()

    def _sendable(self, param: Any) -> Tensor:
        return param.ds_tensor.detach().view(-1).to(self.device)

    def _true(self, param: Any, padded: Tensor) -> Tensor:
        return padded[: param.ds_numel].view(tuple(param.ds_shape))

    def _all_gather(self, params: Sequence[Any]) -> list[Tensor]:
        if not params:
            return []
        pieces = [self._sendable(p) for p in params]
        mine = torch.cat([p.view(torch.uint8) for p in pieces])
        everyone = mine.new_empty(self.world_size, mine.numel())
        dist.all_gather_into_tensor(everyone.view(-1), mine, group=self.group)
        return self._assemble(everyone, params)

    def _assemble(self, everyone: Tensor, params: Sequence[Any]) -> list[Tensor]:
        """Whole parameters from `everyone` (world size x bytes): in each row one rank's shards, in order."""
        whole, at = [], 0
        for param in params:
            dtype, size = param.ds_tensor.dtype, param.ds_tensor.numel() * param.ds_tensor.element_size()
            stretch = everyone[:, at : at + size].reshape(-1)
            if stretch.storage_offset() % param.ds_tensor.element_size():
                stretch = stretch.clone()
            whole.append(self._true(param, stretch.view(dtype)))
            at += size
        return whole


def _holdable(module: nn.Module) -> list[Any]:
    """All that would come with each use, resident or not: out of a recorded order DeepSpeed frees both.

    Not a leaf's parameters: where small modules were made leaves (`stage3_module_granularity_threshold`), DeepSpeed
    empties them after a use whoever else uses them.
    """
    from deepspeed.utils.z3_leaf_module import z3_leaf_module

    leaves = [each for each in module.modules() if z3_leaf_module(each)]
    together = {id(param) for leaf in leaves for param in leaf.parameters()}
    return [p for p in module.parameters() if is_partitioned(p) and id(p) not in together]


def _fetch(params: Sequence[Any]) -> None:
    """Collective. As DeepSpeed fetches for a module: from within a machine where hpZ keeps a secondary shard there.

    One message a parameter, so that none passes through a common buffer, and two of them on their way.
    """
    coming = None
    for param in params:
        following = param.all_gather_coalesced([param])
        if coming is not None:
            coming.wait()
        coming = following
    if coming is not None:
        coming.wait()
