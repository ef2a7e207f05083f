"""What the owner of a matrix does to it in a re-fit: choose, solve, and place the adapter's sparse entries anew."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.decompose import Support, find_support
from dsee_scale.algorithms.delta import AdapterSpec, Delta, low_rank_block
from dsee_scale.algorithms.refit import Factor, sparsegpt, to_storage
from dsee_scale.algorithms.sweep import Count, Groups, Leading, Removal
from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.errors import DSEEError, TargetError
from dsee_scale.partition import stored_dtype
from dsee_scale.passes.decompose_model import seeded

PASSES = 8_000
"""From the solver's times in `benchmarks/calibration.py`; for a square matrix of 2,048 they are a third of it."""


@dataclasses.dataclass(frozen=True)
class Units:
    """What heads or neurons take of one matrix.

    Attributes:
        num_inputs: how many of its inputs, the first of those that are left.
        outputs: (O,) bool, which of its outputs; None for none.
    """

    num_inputs: int = 0
    outputs: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One matrix to solve.

    Attributes:
        member: the weight.
        sparsity: the fraction that goes.
        leader: the module under whose name its input is collected.
        left: (K,) inputs that are still there, where heads or neurons took some; None for all.
        outputs: (O,) float32, what an error in each output counts; None for all alike.
        tokens: for each batch that counts, (T,) float32, what an error at each token counts; None for all alike.
        units: heads or neurons that go of it; None where single entries do.
        zeros_stay: whether the weight's zeros are a pattern, whatever D says there.
        keeps_low_rank: whether the adapter goes on with BA, for which the frozen weight leaves room.
    """

    member: Matrix
    sparsity: float
    leader: str
    left: Tensor | None
    outputs: Tensor | None = None
    tokens: Sequence[Tensor] | None = None
    units: Units | None = None
    zeros_stay: bool = True
    keeps_low_rank: bool = True

    @property
    def is_solved(self) -> bool:
        """Whether entries that stay make up for others of the same output; not where whole outputs go."""
        return self.units is None or self.units.outputs is None

    def gram_of_left(self, gram_II: Tensor) -> Tensor:
        """(K, K) its input's Gram matrix, of the inputs that are still there."""
        if self.left is None:
            return gram_II
        left = self.left.to(gram_II.device)
        return gram_II[left[:, None], left]


def rows_cost(outputs: int, inputs: int) -> int:
    """Multiplications of the solver for so many outputs, about: the sweep, conjugate gradients and errors.

    Its passes over the entries besides take as long as `PASSES` multiplications for each.
    """
    return inputs * outputs * (22 * inputs // 3 + PASSES)


def factor_cost(inputs: int) -> int:
    """Multiplications that factorise a Gram matrix and invert the triangle, about."""
    return 2 * inputs**3 // 3


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """An error of the arithmetic says whose it is. Local."""
    try:
        yield
    except DSEEError:
        raise
    except ValueError as error:
        raise TargetError(
            f"{name} cannot be re-fitted: {error}; leave it out with `modules`, or set refit=False. Nothing was removed"
        ) from error


def settle(module: nn.Module, job: Job, solved: Tensor, delta: Delta | None) -> tuple[Tensor, Support | None]:
    """Local. The new weight as stored, and the adapter's new support.

    What is solved is the effective weight. Where the adapter keeps BA, the frozen weight is what is solved less BA;
    beside the mask BA would bring removed entries back, and it starts again at zero.

    Args:
        module: the model, for the adapters' settings.
        job: the matrix.
        solved: (O, I) float32, what `solve` found; overwritten.
        delta: the adapter's update; None for none.

    Raises:
        TargetError: an entry is NaN, or too large for the weight's dtype.
    """
    with naming(job.member.name):
        return _settled(module, job, solved, delta)


def _settled(
    module: nn.Module, job: Job, solved: Tensor, delta: Delta | None
) -> tuple[Tensor, Support | None]:
    member = job.member
    if member.transposed:
        solved = solved.t().contiguous()
    stored = to_storage(solved, stored_dtype(member.param))
    support = None
    if delta is not None:
        settings = model_state(module).config
        assert settings is not None
        support = _new_support(member, stored.t().contiguous() if member.transposed else stored, settings)
        if job.keeps_low_rank:
            kept = solved != 0
            solved -= low_rank_block(delta, 0, len(solved)).to(solved)
            stored = to_storage(solved.masked_fill_(~kept, 0), stored_dtype(member.param))
            stored.masked_fill_(kept & (stored == 0), torch.finfo(stored.dtype).tiny)
    return stored, support


def removal_of(job: Job, config: PruneConfig) -> Count | Groups | Leading:
    """What goes of a matrix."""
    if job.units is not None:
        return Leading(job.units.num_inputs)
    if config.n_of_m:
        return Groups(*config.n_of_m)
    outputs, inputs = job.member.outputs_by_inputs
    inputs = inputs if job.left is None else len(job.left)
    if config.scope == "row":
        return Count(min(round(job.sparsity * inputs), inputs - 1), "row")
    return Count(min(round(job.sparsity * outputs * inputs), outputs * inputs - 1))


def solve(
    job: Job, rows_R: Tensor, weight_RI: Tensor, gram_KK: Tensor, removal: Removal, factor: Factor
) -> Tensor:
    """Local. Some outputs of a matrix, (R, I) float32, zero where they are pruned.

    Args:
        job: the matrix.
        rows_R: which outputs these are.
        weight_RI: their W + D.
        gram_KK: of the inputs that are still there; others are left out of the problem.
        removal: what goes of these outputs.
        factor: of `gram_KK`.
    """
    if job.left is not None:
        left = job.left.to(weight_RI.device)
        whole = dataclasses.replace(job, left=None)
        inside = solve(whole, rows_R, weight_RI[:, left], gram_KK, removal, factor)
        return torch.zeros_like(weight_RI).index_copy_(1, left, inside)
    if job.outputs is None:
        return sparsegpt(weight_RI, gram_KK, removal, factor=factor).weight
    # Each output is solved on its own, so its weight changes which entries go and nothing else.
    counts_R1 = job.outputs.to(weight_RI.device)[rows_R.to(weight_RI.device), None]
    return sparsegpt(weight_RI * counts_R1, gram_KK, removal, factor=factor).weight / counts_R1


def _new_support(member: Matrix, weight_OI: Tensor, settings: DSEEConfig) -> Support | None:
    """Sparse entries among those that stay, slice by slice; where too few do, some others that stay idle."""
    spec: AdapterSpec = member.adapter.dsee_spec
    weight, slices, first = weight_OI, list(spec.slices), 0
    if member.expert is not None:  # of all experts as they are stored
        weight, slices = (
            (weight_OI.t().contiguous() if member.transposed else weight_OI),
            [(0, member.shape[0])],
        )
        first = member.expert * member.shape[0]
    parts = []
    for k, (start, stop) in enumerate(slices if spec.num_sparse else ()):
        part = weight[start:stop]
        generator = seeded(settings.seed, f"{member.name}:{k}:refit")
        among = part != 0
        if (missing := spec.num_sparse - int(among.sum())) > 0:
            among.view(-1)[(~among).flatten().nonzero()[:missing, 0]] = True
        found = find_support(
            part, spec.num_sparse, settings.support, settings.decomposition, generator, among=among
        )
        parts.append((found.rows + start + first, found.cols))
    if not parts:
        return None
    return Support(torch.cat([rows for rows, _ in parts]), torch.cat([cols for _, cols in parts]))
