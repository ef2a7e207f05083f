"""One block of a re-fit on shards: Gram matrices and weights to the ranks that solve them, new weights back.

Only one group of Gram matrices exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import train_under_mask
from dsee_scale.adapters.matrices import Matrix
from dsee_scale.algorithms.decompose import Support
from dsee_scale.algorithms.delta import AdapterSpec, Delta, delta_block
from dsee_scale.config import PruneConfig
from dsee_scale.errors import CalibrationError
from dsee_scale.partition import Partition
from dsee_scale.partition.port import Part
from dsee_scale.passes.batches import compute_device
from dsee_scale.passes.blocks import Call, run_block
from dsee_scale.passes.calibrate import LEAST_TOKENS
from dsee_scale.passes.inputs.watch import watching
from dsee_scale.passes.routed import RoutedInputs
from dsee_scale.pruning.refit.matrix import Job
from dsee_scale.pruning.refit.panels import is_wide
from dsee_scale.pruning.refit.pieces import Piece
from dsee_scale.pruning.refit.work import block_pass, held, refitting_work
from dsee_scale.pruning.zero_lines import Lines, zero_lines

Request = tuple[list[nn.Parameter], list[int], list[Part]]
"""Parameters, their owners, and the part of each that is meant: what an exchange asks for."""


def grouped(jobs: Sequence[Job], max_bytes: int) -> Iterator[list[Job]]:
    """Matrices whose Gram matrices, and wide ones' factors, fit into the bound together; one input's stay together."""
    by_leader: dict[str, list[Job]] = {}
    for job in jobs:
        by_leader.setdefault(job.leader, []).append(job)
    group: list[Job] = []
    used = 0
    for sharing in by_leader.values():
        inputs = sharing[0].member.num_inputs
        copies = 1 + is_wide(inputs) + (sharing[0].left is not None)
        size = 4 * inputs**2 * copies
        if group and used + size > max_bytes:
            yield group
            group, used = [], 0
        group += sharing
        used += size
    if group:
        yield group


def collect_grams(
    module: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    calls: Sequence[Call],
    holders: Mapping[str, Sequence[int]],
    config: PruneConfig,
    partition: Partition,
) -> tuple[dict[str, Tensor], list[str]]:
    """Collective. X^T X / tokens of the inputs that this rank is a holder of, (I, I) float32, by leader.

    Each token's x^T x counts by what the loss says, where it says something. What too few tokens reached gets the
    identity: its least weights go, the others stay as they are. Those matrices are named besides, the same on all
    ranks.

    Raises:
        CalibrationError: an input is not finite.
    """
    leaders = {job.leader: job for job in jobs}
    linear = {name: module.get_submodule(name) for name, job in leaders.items() if job.member.expert is None}
    owning = {job.member.owner: job.member.module for job in jobs if job.member.expert is not None}
    device = compute_device(module, partition)
    # A rank without the memory must not leave the others in a forward pass.
    with refitting_work(partition, config):
        sizes = {name: job.member.num_inputs for name, job in leaders.items()}
        sums = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()}
    tokens = dict.fromkeys(leaders, 0)
    number = 0  # of batches that count

    def take(name: str, x_TI: Tensor) -> None:
        if name not in sums:  # an expert's that is no part of this
            return
        try:
            counted = leaders[name].tokens
            add_gram_(sums[name], x_TI.float(), None if counted is None else counted[number])
            tokens[name] += x_TI.shape[0]
        except Exception as error:  # the others wait in this forward pass: end it, then fail together
            failed.append(error)

    routed = {name: RoutedInputs(name, each, take) for name, each in owning.items()}
    taken = sum(4 * gram.numel() for gram in sums.values())
    with (
        block_pass(partition, config) as failed,
        held(block, len(calls), config, partition, taken),
        watching(linear, take, routed) as watch,
    ):
        for call in calls:
            with watch.batch(call.batch, call.counts):
                run_block(block, index, call, call.hidden, module, partition)
            number += call.counts
    partition.raise_first(watch.problem)
    counts = partition.sum_over_ranks(torch.tensor(list(tokens.values()), dtype=torch.int64)).tolist()
    tokens = dict(zip(leaders, counts, strict=True))
    few = {name for name in leaders if tokens[name] < (1 if name in linear else LEAST_TOKENS)}
    grams = _reduced(sums, tokens, holders, config, partition)
    for name in grams.keys() & few:
        grams[name].zero_().fill_diagonal_(1)  # in place: without memory others would be left waiting
    return grams, [job.member.name for job in jobs if job.leader in few]


def add_gram_(gram_II: Tensor, x_TI: Tensor, weight_T: Tensor | None = None) -> None:
    """gram += X^T diag(weight) X, all in float32; weights of other tokens, as at an expert, are left out."""
    if weight_T is not None and len(weight_T) == len(x_TI):
        x_TI = x_TI * weight_T.to(x_TI.device).sqrt()[:, None]  # one factor on both sides keeps it symmetric
    gram_II.addmm_(x_TI.t(), x_TI)


def _reduced(
    sums: dict[str, Tensor],
    tokens: Mapping[str, int],
    holders: Mapping[str, Sequence[int]],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. Each Gram matrix summed to the ranks that need it, in place of what it adds up."""
    grams = {}
    broken: Exception | None = None
    largest = max(sums.values(), key=Tensor.numel)
    with refitting_work(partition, config):
        if largest.device != partition.device:  # what a transfer takes
            torch.empty_like(largest, device=partition.device)
    for name in list(sums):
        first, *others = holders[name]
        here = sums.pop(name)
        total = partition.sum_to(here, first)
        if others:
            total = partition.broadcast(here if total is None else total, first)
        if partition.rank not in holders[name]:
            continue
        assert total is not None
        grams[name] = total.div_(max(1, tokens[name]))
        if not bool(grams[name].diagonal().isfinite().all()):
            broken = CalibrationError(
                f"the inputs of {name} hold NaN or infinity; check the calibration batches and the model's weights"
            )
    partition.raise_first(broken)
    return grams


def reserve(request: Request, config: PruneConfig, partition: Partition) -> Tensor:
    """Collective. What an exchange needs on this rank, before any rank waits for one that lacks it."""
    with refitting_work(partition, config):
        return torch.empty(partition.exchange_bytes(*request), dtype=torch.uint8, device=partition.device)


def request_for(pieces: Sequence[Piece]) -> Request:
    """What an exchange with the pieces' ranks asks for."""
    return (
        [piece.job.member.param for piece in pieces],
        [piece.rank for piece in pieces],
        [piece.part for piece in pieces],
    )


def whole_pieces(jobs: Sequence[Job], owners: Mapping[str, int]) -> list[Piece]:
    """Each matrix in one piece, at its owner."""
    return [Piece(job, slice(0, job.member.outputs_by_inputs[0]), owners[job.member.name]) for job in jobs]


def own_weights(
    pieces: Sequence[Piece], owners: Mapping[str, int], config: PruneConfig, partition: Partition
) -> tuple[dict[int, Tensor], dict[str, Delta]]:
    """Collective. W + D of this rank's pieces by index, (rows, I) float32, zero where W is; and D of what it owns."""
    params, ranks, parts = request = request_for(pieces)
    exchange = partition.start_exchange(params, ranks, reserve(request, config, partition), parts)
    with refitting_work(partition, config):
        whole = exchange.wait()
    members = {piece.name: piece.job.member for piece in pieces}
    small = adapter_params(list(members.values()))
    flats = partition.gather(list(small.values())) if small else []
    by_name = dict(zip(small, flats, strict=True))
    needed = {pieces[index].name for index in whole} | {n for n, r in owners.items() if r == partition.rank}
    with refitting_work(partition, config):
        deltas = {n: m.delta(by_name[m.param_name]) for n, m in members.items() if n in needed and m.adapted}
        weights = {
            i: _effective(pieces[i], stored, deltas.get(pieces[i].name)) for i, stored in whole.items()
        }
        return weights, {name: delta for name, delta in deltas.items() if owners[name] == partition.rank}


def adapter_params(members: Sequence[Matrix]) -> dict[str, nn.Parameter]:
    """The matrices' adapters by the name of the adapted parameter: one for all experts of a layer."""
    return {member.param_name: member.adapter.dsee_flat for member in members if member.adapted}


def _effective(piece: Piece, stored: Tensor, delta: Delta | None) -> Tensor:
    """Local. W + D of a piece, (rows, I) float32, given its stored entries."""
    member = piece.job.member
    stored = stored.view(member.shape if member.transposed else (piece.num_rows, member.num_inputs))
    weight = stored.float()
    if delta is not None:
        start = 0 if member.transposed else piece.rows.start
        weight = weight + delta_block(delta, start, start + len(stored)).to(weight.device)
        if piece.job.zeros_stay:  # what an earlier pruning removed is gone, whatever D says there
            weight.masked_fill_(stored == 0, 0)
    return weight.t().contiguous() if member.transposed else weight.clone()


def write_back(
    model: nn.Module,
    jobs: Sequence[Job],
    owners: Mapping[str, int],
    solved: Mapping[str, tuple[Tensor, Support | None]],
    workspace: Tensor,
    config: PruneConfig,
    partition: Partition,
) -> None:
    """Collective. New weights into the shards, new supports to all ranks; S2 = 0, and B too where BA does not go on."""
    values = {at: solved[job.member.name][0] for at, job in enumerate(jobs) if job.member.name in solved}
    params, dealt, parts = request_for(whole_pieces(jobs, owners))
    partition.scatter(params, dealt, values, workspace, parts)
    adapted = [job for job in jobs if job.member.adapted]
    _share_supports([job.member for job in adapted], owners, solved, partition)
    zero_lines(model, partition, _update_lines(adapted))
    for job in adapted:  # the next block's inputs come from the layer as it is trained from here on
        if job.units is None:
            train_under_mask(job.member.adapter, config.mask_update)


def _update_lines(jobs: Sequence[Job]) -> list[Lines]:
    """The values of S2 of these matrices, and B where BA does not go on."""
    gone: dict[str, Tensor] = {}
    for job in jobs:
        member, keeps = job.member, job.keeps_low_rank
        spec: AdapterSpec = member.adapter.dsee_spec
        _, b, v = (math.prod(shape) for shape in spec.shapes)
        mask = gone.setdefault(member.param_name, torch.zeros(b + v, dtype=torch.bool))
        if member.expert is None:
            mask[b if keeps else 0 :] = True
            continue
        rows, n = b // len(spec.slices), spec.num_sparse
        mask[member.expert * rows : (member.expert + 1) * rows] = not keeps
        mask[b + member.expert * n : b + (member.expert + 1) * n] = True
    adapters = {job.member.param_name: job.member.adapter for job in jobs}
    return [
        Lines(each.dsee_flat, 1, gone[name], (1, len(gone[name])), math.prod(each.dsee_spec.shapes[0]))
        for name, each in adapters.items()
    ]


def _share_supports(
    members: Sequence[Matrix],
    owners: Mapping[str, int],
    solved: Mapping[str, tuple[Tensor, Support | None]],
    partition: Partition,
) -> None:
    """Collective. Where the adapters' sparse entries are now, on every rank, in one message from each."""
    for owner in range(partition.world_size):
        own = [m for m in members if owners[m.name] == owner and m.adapter.dsee_spec.num_sparse]
        if not own:
            continue
        views = [_positions(member) for member in own]
        widths = [rows.numel() for rows, _ in views]
        packed = torch.empty(2, sum(widths), dtype=torch.int32, device=partition.device)
        if owner == partition.rank:
            found = [solved[member.name][1] for member in own]
            packed = torch.cat([torch.stack([s.rows, s.cols]) for s in found if s], dim=1).to(packed)
        partition.broadcast(packed, owner)
        for (rows, cols), new in zip(views, packed.split(widths, dim=1), strict=True):
            rows.copy_(new[0])
            cols.copy_(new[1])
    for adapter in {member.param_name: member.adapter for member in members}.values():
        adapter.dsee_prepare()


def _positions(member: Matrix) -> tuple[Tensor, Tensor]:
    """Rows and columns of its adapter's sparse entries, views of the buffers."""
    adapter = member.adapter
    n = adapter.dsee_spec.num_sparse
    own = slice(None) if member.expert is None else slice(member.expert * n, (member.expert + 1) * n)
    return adapter.dsee_rows[own], adapter.dsee_cols[own]
