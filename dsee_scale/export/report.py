"""What an export wrote, for people and for files."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsee_scale.config import UNIT_PATTERNS

KIND = "export"
REPORT_FILE = "dsee_export.json"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote; printing it shows a summary.

    Attributes:
        folder: the exported model.
        delta: how the update was put in.
        files: weight files with their sizes in bytes.
        sparsity: fraction of entries that are zero in the model, of each pruned weight by its name.
        num_pruned: entries of the pruned weights, without heads and neurons that were cut out.
        num_zero: how many of them are zero.
        num_parameters: entries of all tensors of the model.
        seconds: time taken.
        structure: what was cut out, one line; None for nothing.
        num_removed: entries of all tensors that were cut out with them.
        loads_with: `transformers`, or `dsee_scale.load_pretrained` where stock classes cannot load it.
        reason: why they cannot; None where they can.
        patterns: pruned weights of each pattern.
        base: what the update was merged into, where the model was trained on a quantised base.
        distance: largest relative distance (Frobenius) of a merged weight to what was trained, W * M + D, for
            a quantised base; None where it is not known.
    """

    folder: str
    delta: str
    files: dict[str, int]
    sparsity: dict[str, float]
    num_pruned: int
    num_zero: int
    num_parameters: int
    seconds: float
    structure: str | None = None
    num_removed: int = 0
    loads_with: str = "transformers"
    reason: str | None = None
    patterns: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    distance: float | None = None

    @property
    def nbytes(self) -> int:
        """Size of the weight files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        lines = [
            f"dsee_scale: exported {self.num_parameters:,} parameters to {self.folder} (delta={self.delta!r}): "
            f"{len(self.files)} files, {self.nbytes / 1e6:,.1f} MB, {self.seconds:.1f} s"
        ]
        if self.structure:
            lines.append(f"  {self.structure}")
        if self.reason:
            lines.append(f"  stock transformers cannot load it: {self.reason}; {self.loads_with} does")
        if self.base:
            how_far = "not measured" if self.distance is None else f"up to {self.distance:.2g} (relative)"
            lines.append(f"  base: {self.base}; distance of merged weights to what was trained: {how_far}")
        if self.num_pruned and not (self.structure and self.num_zero < self.num_pruned / 10_000):
            share = 100 * self.num_zero / self.num_pruned
            lines.append(f"  {share:.2f}% of the {self.num_pruned:,} entries of pruned weights are zero")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("folder", "seconds")}


def patterns_of(prune_info: Mapping[str, Any]) -> list[str]:
    """What a record says was done to one weight: the units it lost, and the pattern of its zeros."""
    units = [kind for kind in UNIT_PATTERNS if kind in prune_info]
    return list(dict.fromkeys([*units, str(prune_info.get("pattern"))]))


def count_patterns(pruned: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Number of pruned weights of each pattern, those with heads or neurons removed counted under it too."""
    weights = [info for name, info in pruned.items() if not name.endswith(".bias")]
    return dict(collections.Counter(pattern for info in weights for pattern in patterns_of(info)))
