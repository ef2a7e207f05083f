"""Which entries of a matrix go and what the others become, so that its output on given inputs changes least.

Shapes: O output features, I input features, T tokens. For inputs X (T x I) with Gram matrix G = X^T X, a matrix
W and its pruned form V, the squared change of the output is tr((W - V) G (W - V)^T): of the inputs nothing but G
is needed. The rows of V are independent of each other once it is known which entries are zero.

`sparsegpt` chooses and solves in one sweep over the inputs (Frantar and Alistarh, arXiv 2301.00774, section 3):
with G^-1 = U^T U, U upper triangular, an entry's removal costs w^2 / U_jj^2, and its error goes to the inputs
that are still to come. `refit_kept` takes the choice as given and solves for the values alone, by the same sweep
and then conjugate gradients as in ALPS (Meng et al., arXiv 2406.07831, section 3.2), to as many steps as asked.

The defaults are measured by benchmarks/refit_error.py on 35 matrices of SmolLM2-135M: mean squared relative output
error on held-out rows at 50%, 70% and 2:4. After 256 rows of E2E: Wanda 0.0286, 0.0902, 0.0580; the sweep at 1% damping
0.0068, 0.0274, 0.0137; five steps after it 0.0043, 0.0169, 0.0088; those at 10% damping 0.0047, 0.0180, 0.0095. After
32 rows of sentences: Wanda 0.0292, 0.0921, 0.0596; at 1% with five steps 0.0236, 0.0738, 0.0492; at 10% 0.0183, 0.0592,
0.0383.

All arithmetic is float32 on the device of the Gram matrix; that TF32 is off is the caller's business. Both work
on the transposed weight, so that one input's entries are neighbours, and hold about three copies of the weight
and two of the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.score import all_finite
from dsee_scale.algorithms.sweep import Chooser, Count, Groups, Leading, Parts, Removal, chooser_for, sweep_

DAMPING = 0.1
"""Of the mean diagonal. With few tokens well ahead of the usual 1%, with many a little behind."""
NUM_STEPS = 5
"""Conjugate-gradient steps after the sweep."""
COLUMNS = 512
"""Outputs that take those steps together: few enough that the passes over them cost little beside the products."""
RETRIES = 6
"""How often the damping may grow by ten."""
LEAST_MEAN = 1e-30
"""A Gram matrix with a lower mean diagonal counts as zero: its smaller entries are lost to float32."""


@dataclass(frozen=True)
class RefitRecord:
    """What a solver met.

    Attributes:
        damping: what was added to the Gram matrix's diagonal, as a fraction of its mean.
        num_retries: how often the factorisation failed and the damping grew by ten.
        num_dead: inputs that were zero, or next to it, in every token.
    """

    damping: float
    num_retries: int
    num_dead: int


@dataclass(frozen=True, eq=False)
class Refit:
    """A solved matrix.

    Attributes:
        weight: (O, I) float32; an entry is exactly zero where it was removed, and nowhere else.
        record: what the solver met.
    """

    weight: Tensor
    record: RefitRecord


@dataclass(frozen=True, eq=False)
class Factor:
    """A factorised Gram matrix: (G / scale + added I)^-1 = U^T U, U upper triangular.

    Attributes:
        upper: (I, I) float32, U.
        added: what was added to the diagonal.
        record: what it took.
        scale: about G's mean diagonal, so that nothing overflows; a power of four, so that it rounds nothing.
    """

    upper: Tensor
    added: float
    record: RefitRecord
    scale: float = 1.0


@torch.no_grad()
def sparsegpt(
    weight_OI: Tensor,
    gram_II: Tensor,
    removal: Removal,
    *,
    damping: float = DAMPING,
    num_steps: int = NUM_STEPS,
    factor: Factor | None = None,
) -> Refit:
    """Choose the entries that go and re-fit those that stay, in one sweep.

    An entry that is zero already stays zero and counts as removed; where more are zero than are to go, no
    other goes. A count is dealt out over the blocks of inputs in proportion to their entries that are not zero.

    Args:
        weight_OI: the effective weight W + D, any float dtype.
        gram_II: G = X^T X over the calibration tokens, float32.
        removal: how many go.
        damping: added to G's diagonal, as a fraction of its mean.
        num_steps: conjugate-gradient steps after the sweep, see `refit_kept`.
        factor: of `gram_II`, where it is known already; it brings its own damping.

    Returns:
        The new weight and the record.

    Raises:
        ValueError: the weight or the Gram matrix holds NaN or infinity, or `removal` does not fit the matrix.
    """
    _check(weight_OI, gram_II, removal)
    if factor is None:
        factor = factorise(gram_II, damping)
    w_IO = weight_OI.to(gram_II.device, torch.float32).T.contiguous()
    gone_IO = w_IO == 0
    return _solve(w_IO, gone_IO, factor, gram_II, chooser_for(removal, gone_IO), num_steps)


@torch.no_grad()
def refit_kept(
    weight_OI: Tensor,
    gram_II: Tensor,
    kept_OI: Tensor,
    *,
    damping: float = DAMPING,
    num_steps: int = NUM_STEPS,
) -> Refit:
    """Solve for the entries that stay where somebody else has chosen them.

    Args:
        weight_OI: the effective weight W + D before the removal, any float dtype.
        gram_II: G = X^T X over the calibration tokens, float32.
        kept_OI: bool, True for an entry that stays; one that is zero in the weight stays zero all the same.
        damping: added to G's diagonal, as a fraction of its mean.
        num_steps: conjugate-gradient steps after the sweep, which end at the least squares of the damped
            problem. Each costs twice the sweep's multiplications.

    Returns:
        The new weight and the record.

    Raises:
        ValueError: the weight or the Gram matrix holds NaN or infinity, or a shape does not fit.
    """
    _check(weight_OI, gram_II, None)
    if kept_OI.shape != weight_OI.shape:
        raise ValueError(
            f"kept entries of shape {tuple(kept_OI.shape)} for a {tuple(weight_OI.shape)} weight"
        )
    factor = factorise(gram_II, damping)
    w_IO = weight_OI.to(gram_II.device, torch.float32).T.contiguous()
    gone_IO = (w_IO == 0) | ~kept_OI.to(gram_II.device).T
    return _solve(w_IO, gone_IO, factor, gram_II, None, num_steps)


def to_storage(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A solved weight in its storage dtype, with zeros exactly where it had zeros.

    The mask of a pruned weight is W != 0. So an entry that would round to zero becomes the smallest normal
    number of that dtype, with its sign.

    Args:
        weight: float32, any shape.
        dtype: a float dtype.

    Raises:
        ValueError: an entry is NaN, or too large for the dtype.
    """
    stored = weight.to(dtype)
    if not torch.isfinite(stored).all():
        raise ValueError(f"a re-fitted weight holds NaN or a number too large for {dtype}")
    lost = (stored == 0) & (weight != 0)
    return torch.where(lost, torch.copysign(_smallest(dtype, weight.device), stored), stored)


def _smallest(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(torch.finfo(dtype).tiny, dtype=dtype, device=device)


def _check(weight_OI: Tensor, gram_II: Tensor, removal: Removal | None) -> None:
    outputs, inputs = weight_OI.shape
    if gram_II.shape != (inputs, inputs):
        raise ValueError(f"a Gram matrix of shape {tuple(gram_II.shape)} for a {outputs} x {inputs} weight")
    if not torch.isfinite(weight_OI).all():
        raise ValueError("the weight or its update holds NaN or infinity")
    if isinstance(removal, Groups) and (not 0 <= removal.n <= removal.m or inputs % removal.m):
        raise ValueError(f"{removal.n}:{removal.m} does not fit a weight with {inputs} inputs")
    if isinstance(removal, Parts) and (
        sum(rows for rows, _ in removal.counts) != outputs
        or not all(0 <= count <= rows * inputs for rows, count in removal.counts)
    ):
        raise ValueError(f"{removal} does not fit a weight with {outputs} outputs and {inputs} inputs")
    if isinstance(removal, Leading) and not 0 <= removal.num_inputs <= inputs:
        raise ValueError(f"{removal} does not fit a weight with {inputs} inputs")
    if isinstance(removal, Count):
        total = inputs if removal.scope == "row" else outputs * inputs
        if not 0 <= removal.num_remove <= total:
            raise ValueError(
                f"{removal.num_remove} entries of a {removal.scope} cannot go: it has {total} of them"
            )


def upper_inverse(reversed_II: Tensor) -> Tensor | None:
    """U with G^-1 = U^T U, upper triangular, of a G whose inputs are in reverse; None where it is not positive.

    The lower Cholesky factor L of the reversed matrix, reversed back, is an upper R with G = R R^T, so U = R^-1: one
    factorisation and no inverse of G.
    """
    lower, failed = torch.linalg.cholesky_ex(reversed_II)
    if failed:
        return None
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _damped_reversed(gram_II: Tensor, scale: float, added: float) -> Tensor:
    found = gram_II.flip(0, 1).mul_(1 / scale)
    found.diagonal().add_(added)
    return found


def factorise(
    gram_II: Tensor, damping: float, inverse: Callable[[Tensor], Tensor | None] = upper_inverse
) -> Factor:
    """Factorise a damped Gram matrix.

    Args:
        gram_II: G, (I, I) float32.
        damping: added to the diagonal, as a fraction of its mean; grows by ten where the factorisation fails.
        inverse: finds `upper_inverse`'s result, and may overwrite what it is given.

    Raises:
        ValueError: G holds NaN or infinity, or it fails still after `RETRIES` times.
    """
    if not all_finite(gram_II):
        raise ValueError("the Gram matrix holds NaN or infinity: the calibration's activations do")
    diagonal = gram_II.diagonal()
    mean = float(diagonal.double().mean())
    if abs(mean) < LEAST_MEAN:  # No token said anything: every entry counts for itself, as by magnitude.
        record = RefitRecord(damping, 0, len(gram_II))
        return Factor(torch.eye(len(gram_II), device=gram_II.device), 1.0, record)
    num_dead = int((diagonal == 0).sum())
    scale = 4.0 ** math.floor(math.log(abs(mean), 4))
    for retry in range(RETRIES + 1):
        fraction = damping * 10**retry
        added = fraction * mean / scale
        upper = inverse(_damped_reversed(gram_II, scale, added))  # held on to by nobody else
        if upper is not None and all_finite(upper):
            return Factor(upper, added, RefitRecord(fraction, retry, num_dead), scale)
    raise ValueError(
        f"the Gram matrix is not positive semidefinite: its factorisation fails even with {fraction:g} times "
        f"its mean diagonal added"
    )


def _solve(
    w_IO: Tensor,
    gone_IO: Tensor,
    factor: Factor,
    gram_II: Tensor,
    chooser: Chooser | None,
    num_steps: int,
) -> Refit:
    v_IO = w_IO.clone()
    sweep_(v_IO, gone_IO, factor.upper, chooser)
    if num_steps:
        for start in range(0, w_IO.shape[1], COLUMNS):
            here = slice(start, start + COLUMNS)
            v_IO[:, here] = _conjugate_gradients(
                v_IO[:, here].contiguous(), w_IO[:, here], gone_IO[:, here], gram_II, factor, num_steps
            )
    # An entry that happens to be solved as 0 would count as removed.
    v_IO = torch.where((v_IO == 0) & ~gone_IO, _smallest(torch.float32, v_IO.device), v_IO)
    return Refit(v_IO.T.contiguous(), factor.record)


def _conjugate_gradients(
    v_IO: Tensor, w_IO: Tensor, gone_IO: Tensor, gram_II: Tensor, factor: Factor, num_steps: int
) -> Tensor:
    """Lower tr((W - V) (G / scale + added I) (W - V)^T) over the kept entries, by output, from V in place."""
    shrink, added = 1 / factor.scale, factor.added
    inverse_I = (gram_II.diagonal() * shrink + added).reciprocal_()[:, None]
    kept_IO = (~gone_IO).float()  # on a CPU several times as fast a factor as a mask to fill
    product_IO, scratch_IO = torch.empty_like(v_IO), torch.empty_like(v_IO)

    def residual(x_IO: Tensor) -> Tensor:
        return torch.addmm(x_IO, gram_II, x_IO, beta=added, alpha=shrink, out=product_IO).mul_(kept_IO)

    def sums(a_IO: Tensor, b_IO: Tensor) -> Tensor:
        return torch.mul(a_IO, b_IO, out=scratch_IO).sum(dim=0)

    rest_IO = residual(w_IO - v_IO).clone()
    direction_IO = rest_IO * inverse_I
    norm_O = sums(rest_IO, direction_IO)
    for _ in range(num_steps):
        residual(direction_IO)
        # An output that is solved exactly has norm 0: its step is 0, not 0 / 0.
        step_O = norm_O / sums(direction_IO, product_IO).clamp_(min=torch.finfo(torch.float32).tiny)
        v_IO.addcmul_(direction_IO, step_O)
        rest_IO.addcmul_(product_IO, step_O, value=-1)
        conditioned_IO = torch.mul(rest_IO, inverse_I, out=product_IO)
        next_O = sums(rest_IO, conditioned_IO)
        direction_IO.mul_(next_O / norm_O.clamp(min=torch.finfo(torch.float32).tiny)).add_(conditioned_IO)
        norm_O = next_O
    return v_IO
