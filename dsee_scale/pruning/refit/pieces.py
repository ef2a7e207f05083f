"""A block's matrices dealt out to all ranks to be solved, the large ones cut into pieces of some outputs.

Once it is known how many entries each piece loses, its outputs are solved without the others. So a rank needs its
pieces, and the Gram matrices of their inputs with their factors. Where matrices are cut depends on their sizes alone,
and with it how many entries each piece loses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from dsee_scale.algorithms.refit import DAMPING, Factor, factorise, upper_inverse
from dsee_scale.algorithms.score import keys
from dsee_scale.algorithms.sweep import Count, Parts, Removal
from dsee_scale.config import PruneConfig
from dsee_scale.partition import Partition
from dsee_scale.partition.port import Part
from dsee_scale.pruning.common_threshold import NUM_BINS, count_keys_, deal_removals
from dsee_scale.pruning.refit.matrix import Job, factor_cost, naming, removal_of, rows_cost, solve
from dsee_scale.pruning.refit.panels import is_wide, upper_inverse_by_panels
from dsee_scale.pruning.refit.work import refitting_work

logger = logging.getLogger(__name__)

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
    def name(self) -> str:
        """The matrix's."""
        return self.job.member.name

    @property
    def num_rows(self) -> int:
        """How many outputs."""
        return int(self.rows.stop - self.rows.start)

    @property
    def problem(self) -> str:
        """Pieces of one problem share a Gram matrix and its factor."""
        return self.job.leader if self.job.left is None else f"{self.name}, of the inputs left"

    @property
    def part(self) -> Part:
        """Where it is stored in its parameter; None for all of it."""
        member = self.job.member
        if member.expert is None and self.num_rows == member.outputs_by_inputs[0]:
            return None
        return member.offset + self.rows.start * member.num_inputs, self.num_rows * member.num_inputs


def cut(outputs: int, inputs: int) -> list[slice]:
    """A matrix's outputs in pieces of about the same work."""
    rows = max(LEAST_ROWS, PIECE_WORK // inputs**2 // LEAST_ROWS * LEAST_ROWS)
    return [slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows)]


def dealt(jobs: Sequence[Job], world_size: int) -> list[Piece]:
    """Every matrix's pieces, each with its rank; a matrix's own follow each other.

    Weights that are stored with their inputs first (GPT-2's) are not cut: their outputs lie apart.
    """
    pieces = []
    for job in jobs:
        outputs, inputs = job.member.outputs_by_inputs
        cuts = [slice(0, outputs)] if job.member.transposed else cut(outputs, inputs)
        pieces += [Piece(job, rows) for rows in cuts]
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
    """By matrix the rank that has it whole once it is solved: of those that solve it the one that owns least so far."""
    owners: dict[str, int] = {}
    entries: dict[int, int] = {}
    for name, own in _by_matrix(pieces).items():
        owner = min(sorted({piece.rank for piece in own}), key=lambda rank: entries.get(rank, 0))
        entries[owner] = entries.get(owner, 0) + own[0].job.member.numel
        owners[name] = owner
    return owners


def holders(pieces: Sequence[Piece], world_size: int) -> dict[str, list[int]]:
    """The ranks that need the Gram matrix of each leader's input."""
    found: dict[str, set[int]] = {}
    for piece in pieces:
        wide = is_wide(piece.job.member.num_inputs)
        found.setdefault(piece.job.leader, set()).update(range(world_size) if wide else [piece.rank])
    return {leader: sorted(ranks) for leader, ranks in found.items()}


def solve_pieces(
    pieces: Sequence[Piece],
    grams: dict[str, Tensor],
    weights: dict[int, Tensor],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. Solve matrices on all ranks.

    Extra memory: of each wide input a factor of its Gram matrix, of the narrow ones one factor; what the solver takes
    for a rank's pieces of one matrix; and one whole matrix.

    Args:
        pieces: of whole matrices, with inputs that `grams` has.
        grams: by leader, those that this rank needs; emptied.
        weights: by index into `pieces`, W + D of this rank's, (rows, I) float32; emptied.
        owners: rank of each matrix.
        config: what goes.
        partition: port to the ranks.

    Returns:
        The matrices that this rank owns, solved, (O, I) float32.
    """
    wide = [*dict.fromkeys(piece.problem for piece in pieces if is_wide(piece.job.member.num_inputs))]
    with refitting_work(partition, config):
        _to_problems_(grams, pieces)
        if wide:  # room for the factors, and the largest twice: a rank that lacks it must not leave others in a panel
            sizes = [len(grams[name]) ** 2 for name in wide]
            torch.empty(sum(sizes) + max(sizes), device=grams[wide[0]].device)
    counts = _numbers(pieces, grams, weights, config, partition)
    by_panels = partial(upper_inverse_by_panels, partition=partition)
    factors = {name: _factorise(name, grams[name], by_panels) for name in wide}
    with refitting_work(partition, config):
        solved = _solve_own(pieces, grams, factors, weights, counts, config, partition)
    factors.clear()
    found = {
        name: _whole(own, solved, owners[name], config, partition) for name, own in _by_matrix(pieces).items()
    }
    return {name: whole for name, whole in found.items() if whole is not None}


def _to_problems_(grams: dict[str, Tensor], pieces: Sequence[Piece]) -> None:
    """Local. Gram matrices by problem rather than by leader, of the inputs that are left."""
    problems = {piece.problem: piece.job for piece in pieces if piece.job.leader in grams}
    found = {name: job.gram_of_left(grams[job.leader]) for name, job in problems.items()}
    grams.clear()
    grams |= found


def _by_matrix(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found


def _numbers(
    pieces: Sequence[Piece],
    grams: Mapping[str, Tensor],
    weights: Mapping[int, Tensor],
    config: PruneConfig,
    partition: Partition,
) -> dict[int, int]:
    """Collective. How many entries each piece of a cut matrix loses where the matrix's are counted together.

    By index into `pieces`. As many as have the least |W + D| times the norm of their input, as by Wanda.
    """
    removals = {piece.name: removal_of(piece.job, config) for piece in pieces}
    numbers = [i for i, piece in enumerate(pieces) if _counted(piece, removals[piece.name])]
    if not numbers:
        return {}
    with refitting_work(partition, config):
        histograms = torch.zeros(len(numbers), NUM_BINS, dtype=torch.int64, device=partition.device)
        for histogram, index in zip(histograms, numbers, strict=True):
            if index in weights:
                piece = pieces[index]
                _count_costs_(histogram, piece, weights[index], grams[piece.problem].diagonal())
    histograms = partition.sum_over_ranks(histograms)
    found: dict[int, int] = {}
    for name, group in groupby(enumerate(numbers), key=lambda each: pieces[each[1]].name):
        rows, own = zip(*group, strict=True)
        removal = removals[name]
        assert isinstance(removal, Count)
        found |= zip(own, deal_removals(histograms[list(rows)], removal.num_remove), strict=True)
    return found


def _counted(piece: Piece, removal: object) -> bool:
    """Whether it is a part of a matrix whose entries are counted together."""
    whole = piece.num_rows == piece.job.member.outputs_by_inputs[0]
    return not whole and isinstance(removal, Count) and removal.scope == "matrix"


def _count_costs_(histogram: Tensor, piece: Piece, weight_RI: Tensor, squares_K: Tensor) -> None:
    """Add a piece's entries; zeros, which are gone already, to bin 0 and nothing else."""
    if piece.job.left is not None:
        weight_RI = weight_RI[:, piece.job.left.to(weight_RI.device)]
    norms_K = squares_K.to(weight_RI.device).sqrt()
    for rows, block in enumerate(weight_RI.split(LEAST_ROWS)):
        costs = block.abs() * norms_K
        if piece.job.outputs is not None:
            first = piece.rows.start + rows * LEAST_ROWS
            costs *= piece.job.outputs[first : first + len(block), None].to(costs.device)
        count_keys_(histogram, keys(costs.clamp_(min=torch.finfo(costs.dtype).tiny), block))


def _solve_own(
    pieces: Sequence[Piece],
    grams: dict[str, Tensor],
    factors: Mapping[str, Factor],
    weights: dict[int, Tensor],
    counts: Mapping[int, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Local. This rank's pieces of each matrix, solved together, as one."""
    mine = [i for i, piece in enumerate(pieces) if piece.rank == partition.rank]
    solved = {}
    for problem, of_problem in groupby(
        sorted(mine, key=lambda i: (pieces[i].problem, i)), lambda i: pieces[i].problem
    ):
        gram = grams[problem]
        factor = factors[problem] if problem in factors else _factorise(problem, gram)
        for name, of_matrix in groupby(of_problem, lambda i: pieces[i].name):
            own = list(of_matrix)
            job = pieces[own[0]].job
            removal: Removal = removal_of(job, config)
            if all(i in counts for i in own):
                removal = Parts(tuple((pieces[i].num_rows, counts[i]) for i in own))
            rows = torch.cat([torch.arange(pieces[i].rows.start, pieces[i].rows.stop) for i in own])
            parts = [weights.pop(i) for i in own]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            del parts
            with naming(name):
                solved[name] = solve(job, rows, weight, gram, removal, factor)
        del gram, factor
    grams.clear()
    return solved


def _factorise(
    problem: str, gram_II: Tensor, inverse: Callable[[Tensor], Tensor | None] = upper_inverse
) -> Factor:
    """`factorise`, saying what it met. Local where `inverse` is."""
    with naming(problem):
        factor = factorise(gram_II, DAMPING, inverse)
    met = factor.record
    if met.num_retries:
        logger.warning(
            "the inputs of %s are nearly dependent: their Gram matrix was factorised with %g times its mean diagonal "
            "added, instead of %g, so what stays is corrected less; more calibration tokens may help",
            problem,
            met.damping,
            DAMPING,
        )
    if met.num_dead:
        text = "%d of the %d inputs of %s are zero, or next to it, in all tokens"
        logger.info(text, met.num_dead, len(gram_II), problem)
    return factor


def _whole(
    own: Sequence[Piece],
    solved: dict[str, Tensor],
    owner: int,
    config: PruneConfig,
    partition: Partition,
) -> Tensor | None:
    """Collective where several ranks solved parts of a matrix. It on its owner, None elsewhere."""
    found = solved.pop(own[0].name, None)
    if len({piece.rank for piece in own}) == 1:
        return found
    member = own[0].job.member
    with refitting_work(partition, config):
        whole = torch.zeros(member.outputs_by_inputs, device=partition.compute_device(member.param))
        if found is not None:
            parts = found.split([piece.num_rows for piece in own if piece.rank == partition.rank])
            for piece, part in zip([p for p in own if p.rank == partition.rank], parts, strict=True):
                whole[piece.rows] = part
        if whole.device != partition.device:  # what the sum takes
            torch.empty_like(whole, device=partition.device)
    return partition.sum_to(whole, owner)
