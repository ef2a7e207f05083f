"""What each expert of a mixture of experts sees of the tokens that are routed to it.

A hook before a module with fused experts gets the tokens, and for each one the experts it goes to with their gate
values. Each expert runs on its own tokens once more there: the model itself never shows what lies between its two
matrices. Of every expert it takes the sums of squares of both matrices' inputs, the number of tokens, and the sum of
gate value times norm of the output, whose mean over tokens is REAP's score (arXiv 2510.13999, equation 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsee_scale.adapters.experts import AdaptedExperts, ExpertLayout, expert_layout
from dsee_scale.adapters.kernels.grouped import grouped_mm
from dsee_scale.adapters.matrices import ShapeOf
from dsee_scale.algorithms.score import sum_of_squares
from dsee_scale.partition import Partition


class Routed(Protocol):
    """What takes the calls of a module with experts, see `RoutedSums.add`."""

    module: nn.Module

    def add(self, values: tuple[Any, ...], kept: Tensor | None) -> None:
        """One call."""


class RoutedInputs:
    """Hands out, call by call, what each matrix of a module with experts reads: (T, I) under the matrix's name."""

    def __init__(self, name: str, module: nn.Module, take: Callable[[str, Tensor], None]) -> None:
        """`take` is called for experts that some token goes to."""
        layout = expert_layout(module)
        assert layout is not None
        self.name, self.module, self.layout, self.take = name, module, layout, take

    def add(self, values: tuple[Any, ...], kept: Tensor | None) -> None:
        """See `RoutedSums.add`."""
        seen, start = _route(self.module, self.layout, values, kept), 0
        for expert, end in enumerate(seen.ends.tolist()):
            if start < end:
                self.take(f"{self.name}.{expert}.{self.layout.up}", seen.x[start:end])
                self.take(f"{self.name}.{expert}.{self.layout.down}", seen.hidden[start:end])
            start = end


class RoutedSums:
    """Sums over this rank's tokens of the experts of one module.

    Attributes:
        name: the module's.
        module: it itself.
        layout: how it holds its experts.
        up: (E, H) float64, squares of the inputs of the matrices before the activation.
        down: (E, I) float64, those of the ones after it.
        tokens: (E,) float64, tokens that went there.
        gated: (E,) float64, gate value times norm of the output, summed over them.
    """

    def __init__(self, name: str, module: nn.Module, shape_of: ShapeOf) -> None:
        """None seen yet."""
        layout = expert_layout(module)
        assert layout is not None
        self.name, self.module, self.layout = name, module, layout
        shapes = [shape_of(getattr(module, each)) for each in (layout.up, layout.down)]
        widths = [shape[1 if layout.transposed else 2] for shape in shapes]
        self.up, self.down = (torch.zeros(shapes[0][0], each, dtype=torch.float64) for each in widths)
        self.tokens, self.gated = torch.zeros(2, shapes[0][0], dtype=torch.float64)

    def add(self, values: tuple[Any, ...], kept: Tensor | None) -> None:
        """Take one call of the module. Local; its parameters are whole here.

        Args:
            values: (T, H) tokens, (T, K) indices of experts, (T, K) gate values.
            kept: (T,) bool, the tokens that count; None for all.
        """
        module, seen = self.module, _route(self.module, self.layout, values, kept)
        x_SH, hidden_SI, ends_E = seen.x, seen.hidden, seen.ends
        output_SH = _product(module, self.layout.down, hidden_SI, ends_E, seen.experts)
        gated_S = torch.linalg.vector_norm(output_SH.float(), dim=-1) * seen.gates.float()
        # Where the tokens are: nothing waits there until all are summed.
        self.up, self.down, self.gated = (sums.to(x_SH.device) for sums in (self.up, self.down, self.gated))
        start = 0
        for expert, end in enumerate(ends_E.tolist()):
            self.up[expert] += sum_of_squares(x_SH[start:end])
            self.down[expert] += sum_of_squares(hidden_SI[start:end])
            self.gated[expert] += gated_S[start:end].sum(dtype=torch.float64)
            self.tokens[expert] += end - start
            start = end

    def reduce(self, partition: Partition) -> None:
        """Collective. From here on the sums over all ranks, the same on each; one transfer."""
        parts = [part.cpu() for part in (self.up, self.down, self.tokens, self.gated)]
        total = partition.sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
        summed = total.split([part.numel() for part in parts])
        self.up, self.down, self.tokens, self.gated = (
            each.view_as(part) for each, part in zip(summed, parts, strict=True)
        )

    def squares(self) -> dict[str, Tensor]:
        """(inputs,) float32 of each expert's matrices, by name."""
        both = ((self.layout.up, self.up), (self.layout.down, self.down))
        return {
            f"{self.name}.{expert}.{attribute}": row.float()
            for attribute, rows in both
            for expert, row in enumerate(rows)
        }

    def counts(self) -> dict[str, int]:
        """Tokens that reached each expert's matrices, by name."""
        return {
            f"{self.name}.{expert}.{attribute}": int(count)
            for attribute in (self.layout.up, self.layout.down)
            for expert, count in enumerate(self.tokens.tolist())
        }


@dataclass(frozen=True, eq=False)
class _Seen:
    """The tokens of one call in their experts' order, and what they are between an expert's two matrices.

    Attributes:
        x, hidden: (S, H) and (S, I), what the first and the second matrices read.
        gates: (S,) gate values.
        experts: (S,) whose they are.
        ends: (E,) int32, where each expert's end.
    """

    x: Tensor
    hidden: Tensor
    gates: Tensor
    experts: Tensor
    ends: Tensor


def _route(module: Any, layout: ExpertLayout, values: tuple[Any, ...], kept: Tensor | None) -> _Seen:
    """Local; the module's parameters are whole here."""
    x_TH, chosen_TK, gates_TK = (each.reshape(-1, each.shape[-1]) for each in values[:3])
    if kept is not None and kept.numel() == len(x_TH):
        kept = kept.to(x_TH.device)
        x_TH, chosen_TK, gates_TK = x_TH[kept], chosen_TK[kept], gates_TK[kept]
    expert_S, order_S = torch.sort(chosen_TK.reshape(-1), stable=True)
    after = torch.arange(1, module.num_experts + 1, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, after).to(torch.int32)
    x_SH = x_TH[order_S // chosen_TK.shape[1]]
    hidden_SI = _activated(module, layout, _product(module, layout.up, x_SH, ends_E, expert_S))
    return _Seen(x_SH, hidden_SI, gates_TK.reshape(-1)[order_S], expert_S, ends_E)


def _activated(module: Any, layout: ExpertLayout, first: Tensor) -> Tensor:
    """(S, I), what the second matrices read."""
    return module._apply_gate(first) if layout.gated else module.act_fn(first)


def _product(module: Any, name: str, x_SI: Tensor, ends_E: Tensor, expert_S: Tensor) -> Tensor:
    """Tokens, sorted by expert, times their experts' matrices, updates included. Local; parameters are whole here."""
    if isinstance(module, AdaptedExperts) and not module.dsee_disabled:
        return module._product(name, x_SI, ends_E, expert_S)
    weight = getattr(module, name)
    y = grouped_mm(x_SI.to(weight.dtype), weight if module.is_transposed else weight.transpose(1, 2), ends_E)
    return y + getattr(module, f"{name}_bias")[expert_S] if module.has_bias else y


def is_sum(gated: float) -> bool:
    """Whether it can be a sum of gate values times norms."""
    return math.isfinite(gated) and gated >= 0
