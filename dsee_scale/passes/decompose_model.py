"""Supports for all targets: each matrix goes to one rank, which decomposes it and broadcasts positions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.targets import Target
from dsee_scale.algorithms.decompose import Support, find_support
from dsee_scale.algorithms.score import all_finite
from dsee_scale.config import DSEEConfig
from dsee_scale.distributed import show_progress
from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import Exchange, Partition
from dsee_scale.partition.port import Part
from dsee_scale.passes.deal import Round, deal, rounds


@dataclass(frozen=True, eq=False)
class _Piece:
    """A matrix that one rank decomposes: a linear layer's weight with all its slices, or one expert's.

    Attributes:
        target: whose.
        slices: by number, their ranges (start, stop) of the target's outputs.
        part: where an expert's matrix lies in the parameter's flat order; None for a linear layer.
    """

    target: Target
    slices: dict[int, tuple[int, int]]
    part: Part

    @property
    def first_row(self) -> int:
        """Where it begins in the target's matrix."""
        return next(iter(self.slices.values()))[0] if self.part else 0

    @property
    def numel(self) -> int:
        """Entries of the matrix."""
        return self.part[1] if self.part else math.prod(self.target.shape)


def _pieces(target: Target) -> list[_Piece]:
    slices = dict(enumerate(target.slices))
    if not target.experts:
        return [_Piece(target, slices, None)]
    cols = target.shape[1]
    return [
        _Piece(target, {k: (start, stop)}, (start * cols, (stop - start) * cols))
        for k, (start, stop) in slices.items()
    ]


def decompose_model(
    targets: Sequence[Target], config: DSEEConfig, partition: Partition, *, progress: bool | None = None
) -> list[Support]:
    """Collective. The support of each target, equal on all ranks.

    A matrix is received whole by its owner alone. Peak extra memory per rank: what it sends and receives in two
    neighbouring rounds (up to `decomposition.round_memory_mib` each way, or one matrix, whichever is larger) plus
    the decomposition's workspace for one matrix.

    Returns:
        One `Support` per target, in order: rows (K*N,) and cols (K*N,) in the full matrix's coordinates,
        sorted by (slice, row, col).

    Raises:
        TargetError: a weight holds NaN or infinity, the same on every rank.
        PartitionError: a rank ran out of memory in a round.
    """
    pieces = [piece for target in targets for piece in _pieces(target)]
    owners = deal([piece.numel for piece in pieces], partition.world_size)
    if not any(target.num_sparse for target in targets):
        return _share({}, pieces, targets, owners, partition)
    sizes = [piece.numel * piece.target.weight.element_size() for piece in pieces]
    holders = [partition.holder(piece.target.weight, piece.part) for piece in pieces]
    plan = rounds(sizes, owners, partition.world_size, config.decomposition.round_memory_mib << 20, holders)
    workspaces, lacking = _reserve(plan, pieces, partition, config)
    partition.raise_first(lacking)
    supports: dict[int, Support] = {}
    failure: Exception | None = None
    bar = tqdm(total=len(pieces), desc="decompose", unit="matrix", disable=not show_progress(progress))
    for each, exchange in _transfers(plan, pieces, partition, workspaces):
        try:
            mine = exchange.wait()
            if failure is None:
                for at, matrix in mine.items():
                    index = each.indices[at]
                    whole = partition.decode(pieces[index].target.weight, matrix)
                    supports[index] = _piece_support(pieces[index], whole, config)
        except Exception as error:  # the other ranks go on to the next round: follow, then fail together
            failure = failure or _explain(error, config)
        bar.update(len(each.indices))
    bar.close()
    partition.raise_first(failure)
    return _share(supports, pieces, targets, owners, partition)


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the run's seed and a name alone: on no rank, no world size and no device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _reserve(
    plan: list[Round], pieces: Sequence[_Piece], partition: Partition, config: DSEEConfig
) -> tuple[list[Tensor], Exception | None]:
    """Local. Memory for the transfers of two rounds, or the error of a rank that has not got it."""
    size = max((partition.exchange_bytes(*_request(each, pieces)) for each in plan), default=0)
    try:
        return [torch.empty(size, dtype=torch.uint8, device=partition.device) for _ in range(2)], None
    except Exception as error:
        return [], _explain(error, config)


def _transfers(
    plan: list[Round], pieces: Sequence[_Piece], partition: Partition, workspaces: Sequence[Tensor]
) -> Iterator[tuple[Round, Exchange]]:
    """The rounds with their exchanges; the next round's transfer is under way while one is worked on."""

    def start(at: int) -> Exchange | None:
        if at == len(plan):
            return None
        params, owners, parts = _request(plan[at], pieces)
        return partition.start_exchange(params, owners, workspaces[at % 2], parts)

    ahead = start(0)
    for at, each in enumerate(plan):
        current, ahead = ahead, start(at + 1)
        assert current is not None
        yield each, current


def _request(each: Round, pieces: Sequence[_Piece]) -> tuple[list[nn.Parameter], Sequence[int], list[Part]]:
    """What a round sends: parameters, owners, parts of them."""
    return (
        [pieces[i].target.weight for i in each.indices],
        each.owners,
        [pieces[i].part for i in each.indices],
    )


def _piece_support(piece: _Piece, stored: Tensor, config: DSEEConfig) -> Support:
    target = piece.target
    if not all_finite(stored):
        raise TargetError(
            f"{target.weight_name} holds NaN or infinity; expected finite weights: check the checkpoint it came from"
        )
    if piece.part:
        stored = stored.view(-1, target.shape[1])
    weight_OI = stored.t() if target.transposed else stored
    parts = []
    for k, (start, stop) in piece.slices.items():
        generator = seeded(config.seed, f"{target.name}:{k}")
        rows = weight_OI[start - piece.first_row : stop - piece.first_row]
        try:
            part = find_support(rows, target.num_sparse, config.support, config.decomposition, generator)
        except torch.linalg.LinAlgError as error:
            raise TargetError(
                f"{target.weight_name} cannot be decomposed, its values are too large "
                f"({str(error).splitlines()[0]}); check the checkpoint it came from, or choose support='magnitude'"
            ) from error
        parts.append((part.rows + start, part.cols))
    return Support(torch.cat([rows for rows, _ in parts]), torch.cat([cols for _, cols in parts]))


def _share(
    supports: dict[int, Support],
    pieces: Sequence[_Piece],
    targets: Sequence[Target],
    owners: Sequence[int],
    partition: Partition,
) -> list[Support]:
    """Collective. Every target's support on every rank, in one message from each."""
    widths = [len(piece.slices) * piece.target.num_sparse for piece in pieces]
    found: dict[int, Tensor] = {}
    for owner in range(partition.world_size):
        own = [i for i in range(len(pieces)) if owners[i] == owner and widths[i]]
        if not own:
            continue
        if owner == partition.rank:
            packed = torch.cat([torch.stack([supports[i].rows, supports[i].cols]) for i in own], dim=1)
            packed = packed.to(device=partition.device, dtype=torch.int32)
        else:
            width = sum(widths[i] for i in own)
            packed = torch.empty(2, width, dtype=torch.int32, device=partition.device)
        partition.broadcast(packed, owner)
        found.update(zip(own, packed.split([widths[i] for i in own], dim=1), strict=True))
    nowhere = torch.empty(2, 0, dtype=torch.int32, device=partition.device)
    shared: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    for i, piece in enumerate(pieces):
        shared[piece.target.name].append(found.get(i, nowhere))
    return [Support(*torch.cat(shared[target.name], dim=1)) for target in targets]


def _explain(error: Exception, config: DSEEConfig) -> Exception:
    setting = f"decomposition.round_memory_mib (now {config.decomposition.round_memory_mib})"
    return explain_shortage(error, "while decomposing a round of matrices", setting)


def explain_shortage(error: Exception, where: str, setting: str) -> Exception:
    """A PartitionError that names what to lower, if memory ended; any other error as it is. Local."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return PartitionError(f"out of memory {where}; lower {setting}: {error}")
    return error
