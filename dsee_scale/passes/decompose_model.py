"""Supports for all targets: each matrix goes to one rank, which decomposes it and broadcasts positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.targets import Target
from dsee_scale.algorithms.decompose import Support, find_support
from dsee_scale.algorithms.score import all_finite
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import Exchange, Partition
from dsee_scale.passes.deal import Round, deal, rounds
from dsee_scale.passes.progress import show_progress


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
    if not any(target.num_sparse for target in targets):
        return [_share(None, target, 0, partition) for target in targets]
    owners = deal([t.shape[0] * t.shape[1] for t in targets], partition.world_size)
    sizes = [t.shape[0] * t.shape[1] * t.module.weight.element_size() for t in targets]  # type: ignore[operator, union-attr]
    plan = rounds(sizes, owners, partition.world_size, config.decomposition.round_memory_mib << 20)
    workspaces, lacking = _reserve(plan, targets, partition, config)
    partition.raise_together(lacking)
    supports: dict[int, Support] = {}
    failure: Exception | None = None
    bar = tqdm(
        total=len(targets), desc="decompose", unit="matrix", disable=not show_progress(partition, progress)
    )
    for each, exchange in _transfers(plan, targets, partition, workspaces):
        try:
            mine = exchange.wait()
            if failure is None:
                for at, matrix in mine.items():
                    index = each.indices[at]
                    whole = partition.decode(targets[index].module.weight, matrix)  # type: ignore[arg-type]
                    supports[index] = _target_support(targets[index], whole, config)
        except Exception as error:  # the other ranks go on to the next round: follow, then fail together
            failure = failure or _explain(error, config)
        bar.update(len(each.indices))
    bar.close()
    partition.raise_together(failure)
    return [_share(supports.get(i), targets[i], owners[i], partition) for i in range(len(targets))]


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the run's seed and a name alone: on no rank, no world size and no device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _reserve(
    plan: list[Round], targets: Sequence[Target], partition: Partition, config: DSEEConfig
) -> tuple[list[Tensor], Exception | None]:
    """Local. Memory for the transfers of two rounds, or the error of a rank that has not got it."""
    size = max((partition.exchange_bytes(_weights(each, targets), each.owners) for each in plan), default=0)
    try:
        return [torch.empty(size, dtype=torch.uint8, device=partition.device) for _ in range(2)], None
    except Exception as error:
        return [], _explain(error, config)


def _transfers(
    plan: list[Round], targets: Sequence[Target], partition: Partition, workspaces: Sequence[Tensor]
) -> Iterator[tuple[Round, Exchange]]:
    """The rounds with their exchanges; the next round's transfer is under way while one is worked on."""

    def start(at: int) -> Exchange | None:
        if at == len(plan):
            return None
        return partition.start_exchange(_weights(plan[at], targets), plan[at].owners, workspaces[at % 2])

    ahead = start(0)
    for at, each in enumerate(plan):
        current, ahead = ahead, start(at + 1)
        assert current is not None
        yield each, current


def _weights(each: Round, targets: Sequence[Target]) -> list[nn.Parameter]:
    return [targets[i].module.weight for i in each.indices]  # type: ignore[misc]


def _target_support(target: Target, stored: Tensor, config: DSEEConfig) -> Support:
    if not all_finite(stored):
        raise TargetError(
            f"{target.name}.weight holds NaN or infinity; expected finite weights: check the checkpoint it came from"
        )
    weight_OI = stored.t() if target.transposed else stored
    parts = []
    for k, (start, stop) in enumerate(target.slices):
        generator = seeded(config.seed, f"{target.name}:{k}")
        try:
            part = find_support(
                weight_OI[start:stop], target.num_sparse, config.support, config.decomposition, generator
            )
        except torch.linalg.LinAlgError as error:
            raise TargetError(
                f"{target.name}.weight cannot be decomposed, its values are too large ({str(error).splitlines()[0]}); "
                "check the checkpoint it came from, or choose support='magnitude'"
            ) from error
        parts.append((part.rows + start, part.cols))
    return Support(torch.cat([rows for rows, _ in parts]), torch.cat([cols for _, cols in parts]))


def _share(support: Support | None, target: Target, owner: int, partition: Partition) -> Support:
    if support is None:
        packed = torch.empty(
            2, len(target.slices) * target.num_sparse, dtype=torch.int32, device=partition.device
        )
    else:
        packed = torch.stack([support.rows, support.cols]).to(partition.device)
    if packed.numel():
        partition.broadcast(packed, owner)
    return Support(packed[0], packed[1])


def _explain(error: Exception, config: DSEEConfig) -> Exception:
    setting = f"decomposition.round_memory_mib (now {config.decomposition.round_memory_mib})"
    return explain_shortage(error, "while decomposing a round of matrices", setting)


def explain_shortage(error: Exception, where: str, setting: str) -> Exception:
    """A PartitionError that names what to lower, if memory ended; any other error as it is. Local."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return PartitionError(f"out of memory {where}; lower {setting}: {error}")
    return error
