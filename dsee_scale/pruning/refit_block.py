"""One block of a re-fit on shards: its Gram matrices and whole weights to their owners, new weights back.

Nobody but a matrix's owner ever holds it whole, and only one group of Gram matrices exists at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import delta_record, is_adapted
from dsee_scale.algorithms.decompose import Support
from dsee_scale.algorithms.delta import AdapterSpec, delta_block
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import CalibrationError
from dsee_scale.partition import Partition
from dsee_scale.passes.batches import compute_device
from dsee_scale.passes.blocks import Call, run_block
from dsee_scale.passes.calibrate import watching
from dsee_scale.passes.decompose_model import explain_shortage
from dsee_scale.pruning.refit_matrix import Job
from dsee_scale.pruning.zero_lines import Lines, zero_lines


@contextlib.contextmanager
def alike(partition: Partition, config: PruneConfig) -> Iterator[None]:
    """Collective at its end: an error of one rank's local work is every rank's; a shortage names what to lower."""
    with raise_on_all_ranks(partition):
        try:
            yield
        except Exception as error:
            setting = f"gram_memory_mib (now {config.gram_memory_mib})"
            raise explain_shortage(error, "while re-fitting a block", setting) from error


def grouped(jobs: Sequence[Job], max_bytes: int) -> Iterator[list[Job]]:
    """Matrices whose Gram matrices fit into the bound together; those with one input stay together."""
    by_leader: dict[str, list[Job]] = {}
    for job in jobs:
        by_leader.setdefault(job.leader, []).append(job)
    group: list[Job] = []
    used = 0
    for sharing in by_leader.values():
        if group and used + sharing[0].gram_bytes > max_bytes:
            yield group
            group, used = [], 0
        group += sharing
        used += sharing[0].gram_bytes
    if group:
        yield group


def collect_grams(
    module: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    calls: Sequence[Call],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. X^T X / tokens of the inputs of matrices that this rank owns, (I, I) float32, by leader.

    Raises:
        CalibrationError: an input is not finite.
    """
    leaders = {job.leader: job for job in jobs}
    device = compute_device(module, partition)
    with alike(partition, config):  # a rank without the memory must not leave the others in a forward pass
        sums = {
            name: torch.zeros(job.member.num_inputs, job.member.num_inputs, device=device)
            for name, job in leaders.items()
        }
    tokens = dict.fromkeys(leaders, 0)
    short: list[Exception] = []

    def take(name: str, x_TI: Tensor) -> None:
        try:
            add_gram_(sums[name], x_TI.float())
            tokens[name] += x_TI.shape[0]
        except (
            Exception
        ) as error:  # under ZeRO-3 the others wait for this forward pass: end it, then fail together
            short.append(error)

    watched = {name: module.get_submodule(name) for name in leaders}
    with watching(watched, take) as watch:
        for call in calls:
            with watch.batch(call.batch, call.counts):
                run_block(block, index, call, call.hidden, module, partition)
    with alike(partition, config):
        if short:
            raise short[0]
    counts = partition.sum_over_ranks(torch.tensor(list(tokens.values()), dtype=torch.int64)).tolist()
    return _reduced(sums, dict(zip(leaders, counts, strict=True)), jobs, owners, config, partition)


def add_gram_(gram_II: Tensor, x_TI: Tensor) -> None:
    """gram += X^T X, both in float32."""
    gram_II.addmm_(x_TI.t(), x_TI)


def _reduced(
    sums: dict[str, Tensor],
    tokens: Mapping[str, int],
    jobs: Sequence[Job],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. Each Gram matrix summed to the ranks that own a matrix with that input."""
    grams = {}
    broken: Exception | None = None
    for name in list(sums):
        ranks = sorted({owners[job.member.name] for job in jobs if job.leader == name})
        with alike(partition, config):  # a sum takes the place of what it adds up
            copies = [sums[name], *(sums[name].clone() for _ in ranks[1:])]
        del sums[name]
        for owner in ranks:
            total = partition.sum_to(copies.pop(), owner)
            if total is None:
                continue
            grams[name] = total.div_(max(1, tokens[name]))
            if not bool(grams[name].diagonal().isfinite().all()):
                broken = CalibrationError(
                    f"the inputs of {name} hold NaN or infinity; check the calibration batches and the model's weights"
                )
    partition.raise_together(broken)
    return grams


def reserve(
    jobs: Sequence[Job], owners: Mapping[str, int], config: PruneConfig, partition: Partition
) -> Tensor:
    """Collective. What an exchange of these weights needs on this rank, before any rank waits for one that lacks it."""
    params, dealt = [job.member.param for job in jobs], [owners[job.member.name] for job in jobs]
    with alike(partition, config):
        size = partition.exchange_bytes(params, dealt)
        return torch.empty(size, dtype=torch.uint8, device=partition.device)


def owned_weights(
    jobs: Sequence[Job], owners: Mapping[str, int], config: PruneConfig, partition: Partition
) -> dict[str, Tensor]:
    """Collective. Whole W + D, (O, I) float32, of the matrices that this rank owns; zero wherever W is."""
    params = [job.member.param for job in jobs]
    dealt = [owners[job.member.name] for job in jobs]
    workspace = reserve(jobs, owners, config, partition)
    whole = partition.start_exchange(params, dealt, workspace).wait()
    adapted = [job.member for job in jobs if is_adapted(job.member.module)]
    flats = partition.gather([member.module.dsee_flat for member in adapted]) if adapted else []  # type: ignore[misc]
    by_name = dict(zip((member.name for member in adapted), flats, strict=True))
    with alike(partition, config):
        return _effective(jobs, whole, by_name)


def _effective(
    jobs: Sequence[Job], whole: Mapping[int, Tensor], flats: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Local. W + D, (O, I) float32, of owned matrices, given the adapters' values by module name."""
    found = {}
    for index, stored in whole.items():
        member = jobs[index].member
        weight = stored.float()
        if member.name in flats:
            delta = delta_record(member.module, flats[member.name])
            weight = weight + delta_block(delta, 0, member.shape[0]).to(weight.device)
            # What an earlier pruning removed is gone, whatever D says there.
            weight.masked_fill_(stored == 0, 0)
        found[member.name] = weight.t().contiguous() if member.transposed else weight.clone()
    return found


def write_back(
    model: nn.Module,
    jobs: Sequence[Job],
    owners: Mapping[str, int],
    solved: Mapping[str, tuple[Tensor, Support | None]],
    workspace: Tensor,
    partition: Partition,
) -> None:
    """Collective. New weights into the shards, new supports to all ranks, D = 0."""
    values = {at: solved[job.member.name][0] for at, job in enumerate(jobs) if job.member.name in solved}
    params, dealt = [job.member.param for job in jobs], [owners[job.member.name] for job in jobs]
    partition.scatter(params, dealt, values, workspace)
    lines = []
    for job in jobs:
        layer = job.member.module
        if not is_adapted(layer):
            continue
        spec: AdapterSpec = layer.dsee_spec  # type: ignore[assignment]
        if spec.num_sparse:
            support = solved[job.member.name][1] if job.member.name in solved else None
            _share_support(layer, support, owners[job.member.name], partition)
        a, b, v = (math.prod(shape) for shape in spec.shapes)
        gone = torch.ones(b + v, dtype=torch.bool)
        lines.append(Lines(layer.dsee_flat, 1, gone, (1, b + v), a))  # type: ignore[arg-type]
    zero_lines(model, partition, lines)


def _share_support(layer: nn.Module, support: Support | None, owner: int, partition: Partition) -> None:
    rows, cols = layer.dsee_rows, layer.dsee_cols
    if support is None:
        packed = torch.empty(2, rows.numel(), dtype=torch.int32, device=partition.device)  # type: ignore[operator]
    else:
        packed = torch.stack([support.rows, support.cols]).to(partition.device)
    partition.broadcast(packed, owner)
    rows.copy_(packed[0])  # type: ignore[operator]
    cols.copy_(packed[1])  # type: ignore[operator]
    layer.dsee_prepare()  # type: ignore[operator]
