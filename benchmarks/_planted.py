"""Weights with known sparse entries, and the decompositions that `dsee_scale` is compared with.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.01


@dataclass(frozen=True)
class Planted:
    """A weight (O, I) and the flat positions of the entries that were planted in it."""

    weight: Tensor
    positions: Tensor

    def found(self, positions: Tensor) -> int:
        """How many of these flat positions are planted ones."""
        return int(torch.isin(positions, self.positions).sum())


def planted_matrix(
    rows: int,
    cols: int,
    *,
    seed: int,
    heavy: bool = False,
    decay: float = 0.0,
    noise: float = 0.007,
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """Low rank (32, entries of 0.03) + noise + outliers of 0.08 that hide below the largest of L.

    200 outliers of one size; with `heavy`, 64 of 0.08 to 4.4. `decay` bends the 32 singular values from
    level (0) to 1/k (1), which makes single entries of L as large as many outliers.
    """
    generator = torch.Generator().manual_seed(seed)
    rank, double = 32, torch.float64
    left = torch.randn(rows, rank, generator=generator, dtype=double)
    right = torch.randn(rank, cols, generator=generator, dtype=double)
    strength = torch.arange(1, rank + 1, dtype=double) ** -decay
    weight = 0.03 * (left * (strength / strength.norm())) @ right
    weight += noise * torch.randn(rows, cols, generator=generator, dtype=double)
    return plant(weight.to(dtype), 64 if heavy else 200, 0.08, heavy=heavy, seed=seed + 1000)


def plant(weight: Tensor, count: int, size: float, *, heavy: bool, seed: int) -> Planted:
    """Add `count` outliers of random sign; `heavy`: of 1 to 55 times `size`, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(weight.numel(), generator=generator)[:count]
    sizes = torch.full((count,), size, dtype=weight.dtype)
    if heavy:
        sizes *= torch.exp(4 * torch.rand(count, generator=generator, dtype=weight.dtype))
    signs = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    result = weight.clone()
    result.view(-1)[positions] += sizes * signs
    return Planted(result, positions)


def largest(residual: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest entries in size."""
    return residual.abs().flatten().topk(count).indices


def reference_start(cols: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The row that the `reference` preset starts with for a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, cols, generator=generator, dtype=torch.float64).to(dtype)


def reference_loop(weight: Tensor, right: Tensor, rounds: int = 100) -> Tensor:
    """The paper's GreBsmo loop, step by step; returns L (O, I).

    `right` (1, I) is the random row that V starts with. Every round computes the QR of the whole residual
    for five rows of R.
    """
    for _ in range(rounds):
        sparse = torch.zeros_like(weight)
        for _ in range(2):
            left = torch.linalg.qr((weight - sparse) @ right.T)[0]
            right = left.T @ (weight - sparse)
            sparse = weight - left @ right
            sparse = torch.where(sparse.abs() < THRESHOLD, torch.zeros_like(sparse), sparse)
        low = left @ right
        triangle = torch.linalg.qr(weight - low - sparse)[1]
        right = torch.cat([right, triangle[:5]])
    return low


def hard_threshold_loop(weight: Tensor, rank: int, seed: int, rounds: int = 4, times: float = 4.0) -> Tensor:
    """The greedy bilateral loop with a small final rank and a hard relative threshold; returns L (O, I).

    The alternative to clipping that was tried: S is every residual entry above `times` the residual's
    root mean square, and the rank grows in `rounds` steps.
    """
    step = max(1, rank // rounds)
    right = torch.randn(step, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    right = right.to(weight.dtype)
    while True:
        sparse = torch.zeros_like(weight)
        for _ in range(2):
            left = torch.linalg.qr((weight - sparse) @ right.T)[0]
            right = left.T @ (weight - sparse)
            residual = weight - left @ right
            small = residual.abs() < times * residual.square().mean().sqrt()
            sparse = residual.masked_fill(small, 0.0)
        if right.shape[0] >= rank:
            return left @ right
        rest = residual - sparse
        basis = torch.linalg.qr(rest[:, :step])[0]
        right = torch.cat([right, basis.T @ rest])
