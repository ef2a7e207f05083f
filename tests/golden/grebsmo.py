"""The paper's GreBsmo loop, and the golden support made with it.

    python -m tests.golden.grebsmo        writes tests/golden/grebsmo_768.safetensors (about a minute)

The loop is written step by step from the method's description, with the full QR that the `reference`
preset does without. The weight comes from numpy's legacy generator, whose stream never changes.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).with_name("grebsmo_768.safetensors")
SEED = 0
COUNT = 64


def naive_loop(weight: Tensor, right: Tensor, rounds: int) -> Tensor:
    """L (O, I) after `rounds` rounds that start with the row `right` (1, I)."""
    for _ in range(rounds):
        sparse = torch.zeros_like(weight)
        for _ in range(2):
            left = torch.linalg.qr((weight - sparse) @ right.T)[0]
            right = left.T @ (weight - sparse)
            sparse = weight - left @ right
            sparse[sparse.abs() < 0.01] = 0.0
        low = left @ right
        right = torch.cat([right, torch.linalg.qr(weight - low - sparse)[1][:5]])
    return low


def start_row(cols: int) -> Tensor:
    """The row that the `reference` preset starts with for a generator of seed `SEED`."""
    return torch.randn(1, cols, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def noisy_low_rank(rows: int, cols: int, *, outliers: int = 200) -> tuple[Tensor, Tensor]:
    """A float64 weight (O, I) of rank 32 plus noise plus outliers, and the outliers' flat positions.

    On it the loop repeats itself: a change of its start by 1e-14 leaves the support as it is, which is
    not so for every weight (docs/decomposition.md).
    """
    random = numpy.random.RandomState(SEED)
    weight = random.randn(rows, 32) @ random.randn(32, cols) * (0.03 / 32**0.5)
    weight += 0.007 * random.randn(rows, cols)
    positions = random.permutation(rows * cols)[:outliers]
    weight.reshape(-1)[positions] += 0.08 * random.choice([-1.0, 1.0], size=outliers)
    return torch.from_numpy(weight), torch.from_numpy(positions)


def largest(residual: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest entries, ascending; of equal ones the earlier are taken."""
    order = residual.abs().flatten().sort(descending=True, stable=True).indices
    return order[:count].sort().values


def main() -> None:
    weight, _ = noisy_low_rank(768, 768)
    start = start_row(768)
    picks = [
        largest(weight - naive_loop(weight, row, rounds=100), COUNT) for row in (start, start * (1 + 1e-14))
    ]
    assert torch.equal(*picks), "the loop does not repeat itself on this weight: choose another"
    save_file({"start": start, "positions": picks[0]}, GOLDEN)


if __name__ == "__main__":
    main()
