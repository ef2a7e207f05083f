"""The paper's GreBsmo loop, its result kept and its cost cut: the `reference` preset.

Shapes: O output features, I input features, K rank so far. X = W - S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsee_scale.errors import ConfigError

ROUNDS = 100
RANK_STEP = 5
THRESHOLD = 0.01
"""Residual entries below this size are not part of S. Absolute, whatever the weight's scale: the paper's."""

BLOCK = 2**16
"""Entries of a row block in elementwise steps, few enough for the cache."""


def reference_low_rank(
    weight: Tensor, generator: torch.Generator, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """The low-rank part of a float32 or float64 weight (O, I): U (O, K) and V (K, I).

    V starts as one random row. A round sets S = 0 and then twice U = orth(X V^T), V = U^T X and
    S = W - U V with its small entries dropped; then V gains five rows of R, E = W - U V - S = Q R.
    Those rows are Q5^T E, where Q5 comes from the first five columns of E alone, so the QR of the whole E
    is never computed. K ends at 496, or at the smaller side.

    Extra memory: one O x I tensor besides the factors.

    Raises:
        ConfigError: the weight's entries are so large that the products overflow, as the paper's own do.
    """
    start = torch.randn(1, weight.shape[1], generator=generator, dtype=torch.float64, device=generator.device)
    right = start.to(weight.device, weight.dtype)
    x = torch.empty_like(weight)
    for index in range(rounds):
        left, right = _update(weight, right)
        _without_sparse(weight, left, right, out=x)
        left, right = _update(x, right)
        if index < rounds - 1:
            _without_sparse(weight, left, right, out=x)
            right = torch.cat([right, _new_rows(x, left, right)])
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ConfigError(
            f"decomposition preset 'reference' overflows on this {tuple(weight.shape)} weight (largest "
            f"entry {float(weight.abs().amax()):.3g}); use preset 'fast', or rescale the weight"
        )
    return left, right


def _update(x: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    # (V X^T)^T is X V^T in the column order that LAPACK works in; the triangle R is not needed.
    packed, scales = torch.geqrf((right @ x.T).T)
    left = torch.linalg.householder_product(packed[:, : len(scales)], scales)
    return left, left.T @ x


def _without_sparse(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """X = W - S, where S is W - U V without its small entries."""
    torch.mm(left, right, out=out)
    below = float(torch.nextafter(weight.new_tensor(THRESHOLD), weight.new_zeros(())))
    rows = max(1, BLOCK // weight.shape[1])
    for w, x in zip(weight.split(rows), out.split(rows), strict=True):
        torch.sub(w, torch.hardshrink(torch.sub(w, x, out=x), below), out=x)  # keeps |entry| > below


def _new_rows(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The first five rows of R in E = Q R, for E = X - U V, without E."""
    basis = torch.linalg.qr(x[:, :RANK_STEP] - left @ right[:, :RANK_STEP])[0]
    return basis.T @ x - (basis.T @ left) @ right
