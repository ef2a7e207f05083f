"""Encoded examples to a padded batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsee_scale.training.encoding import IGNORED, pad


@dataclasses.dataclass(frozen=True)
class Collator:
    """Pads on the right, where causal attention never looks, so that positions need no correction."""

    pad_id: int
    """Token that fills short rows; it is masked and has no label."""

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Tensors `input_ids`, `attention_mask` and `labels`, each (batch, longest)."""
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": torch.tensor(pad(ids, self.pad_id)),
            "attention_mask": torch.tensor(pad([[1] * len(row) for row in ids], 0)),
            "labels": torch.tensor(pad([row["labels"] for row in rows], IGNORED)),
        }
