"""What a re-fit's sweep goes by: U, upper triangular, with (G + added I)^-1 = U^T U for a Gram matrix G (I x I)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RETRIES = 6
"""How often the damping may grow by ten."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A factorised Gram matrix.

    Attributes:
        upper: (I, I) float32, U.
        added: what was added to the diagonal.
        damping: the same as a fraction of the mean diagonal.
        num_retries: how often the factorisation failed and the damping grew by ten.
        num_dead: inputs that were zero in every token.
    """

    upper: Tensor
    added: float
    damping: float
    num_retries: int
    num_dead: int


def inverse_cholesky(damped_II: Tensor) -> Tensor | None:
    """L^-1 for G = L L^T, L lower triangular; None where G is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(damped_II)
    if failed:
        return None
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


def factorise(
    gram_II: Tensor, damping: float, inverse: Callable[[Tensor], Tensor | None] = inverse_cholesky
) -> Factor:
    """Factorise a damped Gram matrix.

    Args:
        gram_II: G, (I, I) float32, finite.
        damping: added to the diagonal, as a fraction of its mean; grows by ten where the factorisation fails.
        inverse: finds `inverse_cholesky`'s result, and may overwrite what it is given.

    Raises:
        ValueError: it fails still after `RETRIES` times.
    """
    diagonal = gram_II.diagonal()
    mean = float(diagonal.double().mean())
    num_dead = int((diagonal == 0).sum())
    if mean == 0:  # No token said anything: every entry counts for itself, as by magnitude.
        return Factor(torch.eye(len(gram_II), device=gram_II.device), 1.0, damping, 0, num_dead)
    for retry in range(RETRIES + 1):
        fraction = damping * 10**retry
        # The lower Cholesky factor of the reversed matrix, reversed back, is an upper R with G = R R^T, so
        # U = R^-1: one factorisation and no inverse of G.
        damped = gram_II.flip(0, 1)
        damped.diagonal().add_(fraction * mean)
        found = inverse(damped)
        if found is not None and torch.isfinite(found).all():
            return Factor(found.flip(0, 1), fraction * mean, fraction, retry, num_dead)
    raise ValueError(
        f"the Gram matrix is not positive semidefinite: its factorisation fails even with {fraction:g} times "
        f"its mean diagonal added"
    )
