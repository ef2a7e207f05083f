"""A block's matrices dealt out to all ranks to be solved, the large ones cut into pieces of some outputs.

Once it is known how many entries each piece loses, its outputs are solved without the others. So the ranks need an
input's Gram matrix and its factor, and their own pieces. Where matrices are cut depends on their sizes alone, so the
result doesn't depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from dsee_scale.algorithms.refit import DAMPING, Factor, factorise
from dsee_scale.algorithms.sweep import Count, Groups, lowest
from dsee_scale.config import PruneConfig
from dsee_scale.partition import Partition
from dsee_scale.pruning.refit.block import refitting_work
from dsee_scale.pruning.refit.matrix import Job, factor_cost, removal_of, rows_cost, solve
from dsee_scale.pruning.refit.panels import inverse_by_panels, is_wide

LEAST_ROWS = 128
"""Outputs of a piece at least: fewer would make narrow products."""
PIECE_WORK = 256 * 8192**2
"""Outputs times the square of the inputs of a piece, about."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Outputs of a matrix that one rank solves.

    Attributes:
        job: the matrix.
        rows: the outputs.
        rank: who solves them.
    """

    job: Job
    rows: slice
    rank: int = 0

    @property
    def num_rows(self) -> int:
        """How many outputs."""
        return int(self.rows.stop - self.rows.start)

    @property
    def problem(self) -> str:
        """Pieces of one problem share a Gram matrix and its factor."""
        return self.job.leader if self.job.left is None else self.job.member.name


def cut(outputs: int, inputs: int) -> list[slice]:
    """A matrix's outputs in pieces of about the same work."""
    rows = max(LEAST_ROWS, PIECE_WORK // inputs**2 // LEAST_ROWS * LEAST_ROWS)
    return [slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows)]


def dealt(jobs: Sequence[Job], world_size: int) -> list[Piece]:
    """Every matrix's pieces, each with its rank; a matrix's own follow each other."""
    pieces = [Piece(job, rows) for job in jobs for rows in cut(*job.member.outputs_by_inputs)]
    sizes = [(piece.problem, piece.num_rows, piece.job.member.num_inputs) for piece in pieces]
    ranks = deal_pieces(sizes, world_size)
    return [replace(piece, rank=rank) for piece, rank in zip(pieces, ranks, strict=True)]


def deal_pieces(sizes: Sequence[tuple[str, int, int]], world_size: int) -> list[int]:
    """The rank of each piece: problem after problem, each piece to the least loaded rank.

    A wide problem's factor is everybody's; a narrow one's is made on every rank with a piece of it, so its pieces stay
    together while a rank has not its share of all.

    Args:
        sizes: problem, outputs and inputs of each piece.
        world_size: ranks.
    """
    costs = [rows_cost(outputs, inputs) for _, outputs, inputs in sizes]
    whole: dict[str, int] = {}
    for (problem, _, _), cost in zip(sizes, costs, strict=True):
        whole[problem] = whole.get(problem, 0) + cost
    total, load, ranks = sum(costs), [0] * world_size, [0] * len(sizes)
    latest: dict[str, int] = {}
    for index in sorted(range(len(sizes)), key=lambda i: (-whole[sizes[i][0]], sizes[i][0], i)):
        (problem, _, inputs), cost = sizes[index], costs[index]
        rank = latest.get(problem)
        if rank is None or (load[rank] + cost) * world_size > total:
            rank = min(range(world_size), key=lambda r: (load[r], r))
            if not is_wide(inputs):
                latest[problem] = rank
                load[rank] += factor_cost(inputs)
        load[rank] += cost
        ranks[index] = rank
    return ranks


def owners_of(pieces: Sequence[Piece]) -> dict[str, int]:
    """By matrix the rank that has it whole before and afterwards: its first piece's."""
    return {piece.job.member.name: piece.rank for piece in reversed(pieces)}


def holders(pieces: Sequence[Piece], world_size: int) -> dict[str, list[int]]:
    """The ranks that need the Gram matrix of each leader's input."""
    found: dict[str, set[int]] = {}
    for piece in pieces:
        wide = is_wide(piece.job.member.num_inputs)
        found.setdefault(piece.job.leader, set()).update(range(world_size) if wide else [piece.rank])
    return {leader: sorted(ranks) for leader, ranks in found.items()}


def solve_pieces(
    pieces: Sequence[Piece],
    grams: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. Solve matrices on all ranks.

    Extra memory: of each wide input a factor of its Gram matrix, of the narrow ones one factor; of cut matrices the
    rank's own pieces, and one whole matrix.

    Args:
        pieces: of whole matrices, with inputs that `grams` has.
        grams: by leader, those that this rank needs.
        weights: by name, W + D of the matrices that this rank owns, (O, I) float32; emptied.
        owners: rank of each matrix.
        config: what goes.
        partition: port to the ranks.

    Returns:
        The matrices that this rank owns, solved.
    """
    by_matrix: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_matrix.setdefault(piece.job.member.name, []).append(piece)
    mine: list[_Task] = []
    for name, own in by_matrix.items():
        mine += _hand_out(own, grams, weights.pop(name, None), owners[name], config, partition)
    wide = {piece.problem: piece for piece in pieces if is_wide(piece.job.member.num_inputs)}
    factors = {name: _shared_factor(piece, grams, config, partition) for name, piece in wide.items()}
    with refitting_work(partition, config):
        solved = _solve_all(sorted(mine, key=lambda task: task.piece.problem), grams, factors)
    del mine, factors
    found = {
        name: _take_back(own, solved.pop(name, {}), owners[name], config, partition)
        for name, own in by_matrix.items()
    }
    return {name: whole for name, whole in found.items() if whole is not None}


@dataclass(frozen=True, eq=False)
class _Task:
    """A piece with its W + D, (rows, I) float32, and what goes of it."""

    piece: Piece
    weight: Tensor
    removal: Count | Groups


def _hand_out(
    own: Sequence[Piece],
    grams: Mapping[str, Tensor],
    weight: Tensor | None,
    owner: int,
    config: PruneConfig,
    partition: Partition,
) -> list[_Task]:
    """Collective where a matrix is cut. This rank's pieces of it, given the whole one on its owner."""
    job = own[0].job
    removal = removal_of(job, config)
    if len(own) == 1:
        return [] if weight is None else [_Task(own[0], weight, removal)]
    with refitting_work(partition, config):
        counts = torch.zeros(len(own), dtype=torch.int64, device=partition.device)
        if weight is None:
            where = partition.compute_device(job.member.param)
            weight = torch.empty(job.member.outputs_by_inputs, device=where)
        elif isinstance(removal, Count) and removal.scope == "matrix":
            counts += _numbers(own, removal, weight, grams[job.leader]).to(counts.device)
    partition.broadcast(counts, owner)
    partition.broadcast(weight, owner)
    tasks = []
    with refitting_work(partition, config):
        for piece, count in zip(own, counts.tolist(), strict=True):
            if piece.rank == partition.rank:
                rows = weight[piece.rows] if owner == partition.rank else weight[piece.rows].clone()
                goes = Count(count) if isinstance(removal, Count) and removal.scope == "matrix" else removal
                tasks.append(_Task(piece, rows, goes))
    return tasks


def _numbers(own: Sequence[Piece], removal: Count, weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """(pieces,) int64: how many of the entries with the smallest w^2 G_jj lie in each piece, as by Wanda."""
    job = own[0].job
    costs_OI = weight_OI.square().mul_(gram_II.diagonal())
    if job.outputs is not None:
        costs_OI.mul_(job.outputs.to(costs_OI).square()[:, None])
    if job.left is not None:
        costs_OI = costs_OI[:, job.left.to(costs_OI.device)]
    per_row = lowest(costs_OI, removal.num_remove).sum(dim=1)
    return torch.stack([per_row[piece.rows].sum() for piece in own])


def _shared_factor(
    piece: Piece, grams: Mapping[str, Tensor], config: PruneConfig, partition: Partition
) -> Factor:
    """Collective. The factor of a wide problem on every rank."""
    with refitting_work(partition, config):
        gram = piece.job.gram_of_left(grams[piece.job.leader])
        # A rank without the memory must not leave the others in a panel.
        torch.empty(2, *gram.shape, device=gram.device)
    return factorise(gram, DAMPING, partial(inverse_by_panels, partition=partition))


def _solve_all(
    tasks: Sequence[_Task], grams: Mapping[str, Tensor], factors: Mapping[str, Factor]
) -> dict[str, dict[int, Tensor]]:
    """Local. By matrix the solved pieces by their first row; tasks of one problem follow each other."""
    found: dict[str, dict[int, Tensor]] = {}
    for problem, group in groupby(tasks, key=lambda task: task.piece.problem):
        gram: Tensor | None = None
        for task in group:
            piece = task.piece
            if gram is None:
                gram = piece.job.gram_of_left(grams[piece.job.leader])
                factor = factors.get(problem) or factorise(gram, DAMPING)
            solved = solve(piece.job, piece.rows, task.weight, gram, task.removal, factor)
            found.setdefault(piece.job.member.name, {})[piece.rows.start] = solved
    return found


def _take_back(
    own: Sequence[Piece],
    solved: Mapping[int, Tensor],
    owner: int,
    config: PruneConfig,
    partition: Partition,
) -> Tensor | None:
    """Collective where a matrix is cut. The whole matrix on its owner, None elsewhere."""
    if len(own) == 1:
        return solved.get(0)
    member = own[0].job.member
    with refitting_work(partition, config):
        whole = torch.zeros(member.outputs_by_inputs, device=partition.compute_device(member.param))
        for start, part in solved.items():
            whole[start : start + len(part)] = part
    return partition.sum_to(whole, owner)
