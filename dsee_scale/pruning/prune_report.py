"""What a pruning did: zeros of each matrix, units that are gone, and what too few tokens reached."""

from __future__ import annotations

import dataclasses

from dsee_scale.passes.coverage import Coverage

Counts = dict[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What `prune` did; printing it shows a table.

    Attributes:
        matrices: weight's module name -> (zeros, entries).
        seconds: time of the whole pass.
        units: block and kind -> (heads, neurons or experts that are gone, all of them), for those patterns.
        by_magnitude: matrices that no calibration token reached, and those of experts that fewer than 32 reached:
            scored by |W| under score `wanda`, by |W + D| and not solved under a re-fit.
        coverage: how much of the blocks the matrices are.
    """

    matrices: Counts
    seconds: float
    units: Counts = dataclasses.field(default_factory=dict)
    by_magnitude: tuple[str, ...] = ()
    coverage: Coverage | None = None

    @property
    def removed(self) -> int:
        """Zeros in all pruned weights."""
        return sum(zeros for zeros, _ in self.matrices.values())

    @property
    def total(self) -> int:
        """Entries of all pruned weights."""
        return sum(numel for _, numel in self.matrices.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned weights' entries that is zero."""
        return self.removed / self.total

    def followed_by(self, later: PruneReport) -> PruneReport:
        """This report and a later one, whose counts hold where both have a matrix."""
        return PruneReport(
            {**self.matrices, **later.matrices},
            self.seconds + later.seconds,
            {**self.units, **later.units},
            (*self.by_magnitude, *later.by_magnitude),
            later.coverage,
        )

    def __str__(self) -> str:
        groups: dict[str, list[tuple[int, int]]] = {}
        for name, counts in self.matrices.items():
            groups.setdefault(name.rsplit(".", 1)[-1], []).append(counts)
        lines = [
            f"dsee_scale: {self.removed:,} of {self.total:,} weights are zero ({100 * self.sparsity:.2f}%), "
            f"in {len(self.matrices)} matrices, {self.seconds:.1f} s"
        ]
        if self.coverage:
            lines.append(f"  pruned were {self.coverage}")
        for kind in dict.fromkeys(name.rsplit(" ", 1)[-1] for name in self.units):
            layers = [counts for name, counts in self.units.items() if name.endswith(f" {kind}")]
            gone, all_units = map(sum, zip(*layers, strict=True))
            lines.append(f"  {gone:,} of {all_units:,} {kind} are gone, in {len(layers)} layers")
        for suffix, found in groups.items():
            shares = [100 * zeros / numel for zeros, numel in found]
            mean = 100 * sum(z for z, _ in found) / sum(n for _, n in found)
            lines.append(
                f"  {len(found):4d} x {suffix:<16} {mean:5.1f}% (from {min(shares):.1f}% to {max(shares):.1f}%)"
            )
        if self.by_magnitude:
            shown = ", ".join(self.by_magnitude[:8])
            more = f" and {len(self.by_magnitude) - 8} more" if len(self.by_magnitude) > 8 else ""
            lines.append(f"  too few calibration tokens reached {shown}{more}: pruned by magnitude")
        return "\n".join(lines)
