"""One sweep over a matrix's inputs that zeroes entries and lets later inputs make up for what each one loses.

Shapes: O output features, I input features. With (G + added I)^-1 = U^T U, U upper triangular, the removal of
entry w of input j costs w^2 / U_jj^2 and changes the entries of every later input k by -(w / U_jj) U_jk
(Frantar and Alistarh, arXiv 2301.00774, section 3). Weights are held transposed, so that the entries of one input
are neighbours.

The order of work is the paper's; the products are grouped differently: an input takes its own strip's errors when
its turn comes (one matrix-vector product), its block's earlier strips' and all earlier blocks' by matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dsee_scale.algorithms.patterns import lowest_in_groups

BLOCK = 128
"""Inputs whose errors reach all later inputs in one matrix product; a choice is made for as many at once."""
STRIP = 32
"""Inputs that are solved one by one before a product; what they touch stays in a core's cache."""
SPAN = 16
"""Inputs whose N:M groups are chosen at once."""


@dataclass(frozen=True)
class Count:
    """So many entries go, of the whole matrix or of each row; of equal ones the first.

    Attributes:
        num_remove: entries that are zero afterwards, those that were zero before among them.
        scope: what `num_remove` counts in.
    """

    num_remove: int
    scope: Literal["matrix", "row"] = "matrix"


@dataclass(frozen=True)
class Parts:
    """So many entries go of each of a matrix's parts, of equal ones the first.

    Attributes:
        counts: the outputs of each part, which follow each other, and what `Count.num_remove` is for it.
    """

    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Groups:
    """At most N of each M neighbouring inputs stay.

    Attributes:
        n: N.
        m: M, a divisor of I.
    """

    n: int
    m: int


@dataclass(frozen=True)
class Leading:
    """The first inputs go whole, such as those of heads or neurons; the others are then solved exactly.

    Attributes:
        num_inputs: how many.
    """

    num_inputs: int


def sweep_(w_IO: Tensor, gone_IO: Tensor, upper_II: Tensor, chooser: Chooser | None) -> None:
    """Solve in place."""
    diagonal = upper_II.diagonal()
    strip = chooser.span * max(1, STRIP // chooser.span) if isinstance(chooser, GroupChooser) else STRIP
    block = strip * max(1, BLOCK // strip)
    errors = w_IO.new_empty(min(block, len(w_IO)), w_IO.shape[1])
    for start in range(0, len(w_IO), block):
        stop = min(start + block, len(w_IO))
        if isinstance(chooser, (CountChooser, PartsChooser)):
            chooser.choose_(w_IO[start:stop], diagonal[start:stop], gone_IO[start:stop], start // block)
        for first in range(start, stop, strip):
            last = min(first + strip, stop)
            found = errors[first - start : last - start]
            if isinstance(chooser, GroupChooser):
                _sweep_groups_(
                    w_IO[first:last], gone_IO[first:last], upper_II[first:last, first:last], chooser, found
                )
            else:
                _sweep_strip_(w_IO[first:last], gone_IO[first:last], upper_II[first:last, first:last], found)
            w_IO[last:stop].addmm_(upper_II[first:last, last:stop].T, found, alpha=-1)
        found = errors[: stop - start]
        w_IO[stop:].addmm_(upper_II[start:stop, stop:].T, found, alpha=-1)
    w_IO.masked_fill_(gone_IO, 0)


def _sweep_groups_(
    w_IO: Tensor, gone_IO: Tensor, upper_II: Tensor, chooser: GroupChooser, errors: Tensor
) -> None:
    """`_sweep_strip_` for a strip whose entries are chosen on the way."""
    for first in range(0, len(w_IO), chooser.span):
        here = slice(first, first + chooser.span)
        w_IO[here].addmm_(upper_II[:first, here].T, errors[:first], alpha=-1)
        chooser.choose_(w_IO[here], upper_II.diagonal()[here], gone_IO[here])
        _sweep_strip_(w_IO[here], gone_IO[here], upper_II[here, here], errors[here])


def _sweep_strip_(w_IO: Tensor, gone_IO: Tensor, upper_II: Tensor, errors: Tensor) -> None:
    """Solve a few inputs one after the other.

    Args:
        w_IO: their entries, changed in place; those that go keep what is to be made up for.
        gone_IO: which go.
        upper_II: their part of U.
        errors: written: what each input leaves to the later ones, 0 where an entry stays.
    """
    scale_IO = gone_IO / upper_II.diagonal()[:, None]
    columns = upper_II.T.contiguous()
    for place, (entries, scale, error) in enumerate(zip(w_IO, scale_IO, errors, strict=True)):
        if place:
            entries.addmv_(errors[:place].T, columns[place, :place], alpha=-1)
        torch.mul(entries, scale, out=error)


class CountChooser:
    """Chooses a block's share of a number, in each of equally large parts: a part is an output, or the whole matrix.

    Args:
        counts: what goes of each part.
        gone_IO: which entries are zero already; the parts' outputs follow each other.
    """

    def __init__(self, counts: Sequence[int], gone_IO: Tensor) -> None:
        self._num_parts = len(counts)
        live_IP = (~gone_IO).view(len(gone_IO), len(counts), -1).sum(dim=2)
        # (blocks + 1, P): entries that are not zero before each block.
        ends = torch.stack([part.sum(dim=0) for part in live_IP.split(BLOCK)]).cumsum(0)
        self._before = torch.cat([torch.zeros_like(ends[:1]), ends])
        total = ends[-1]
        entries = gone_IO.numel() // len(counts)
        wanted = torch.tensor(counts, device=gone_IO.device)
        self._extra = (wanted - (entries - total)).clamp_(min=0)
        self._total = total.clamp(min=1)

    def choose_(self, w_IO: Tensor, upper_I: Tensor, gone_IO: Tensor, block: int) -> None:
        """Mark what goes of a block of inputs."""
        share = self._share(block + 1) - self._share(block)
        costs_IO = (w_IO / upper_I[:, None]).square_().masked_fill_(gone_IO, math.inf)
        if self._num_parts == 1:
            gone_IO |= _lowest(costs_IO, int(share))
            return
        costs_IPR = costs_IO.view(len(costs_IO), self._num_parts, -1)
        found = _lowest_of_each(costs_IPR.transpose(1, 2).flatten(0, 1), share)
        gone_IO |= found.view(len(costs_IO), -1, self._num_parts).transpose(1, 2).reshape(costs_IO.shape)

    def _share(self, block: int) -> Tensor:
        return (2 * self._extra * self._before[block] + self._total) // (2 * self._total)


class PartsChooser:
    """Chooses in each run of equally large parts."""

    def __init__(self, removal: Parts, gone_IO: Tensor) -> None:
        self._runs = []
        start = 0
        for outputs, run in groupby(removal.counts, key=lambda part: part[0]):
            counts = [count for _, count in run]
            part = slice(start, start + outputs * len(counts))
            self._runs.append((part, CountChooser(counts, gone_IO[:, part])))
            start = part.stop

    def choose_(self, w_IO: Tensor, upper_I: Tensor, gone_IO: Tensor, block: int) -> None:
        """Mark what goes of a block of inputs."""
        for part, chooser in self._runs:
            chooser.choose_(w_IO[:, part], upper_I, gone_IO[:, part], block)


class GroupChooser:
    """Chooses N of each M inputs, for `span` inputs at once when the sweep comes to them."""

    def __init__(self, removal: Groups) -> None:
        self.span = removal.m * max(1, SPAN // removal.m)
        self._removal = removal

    def choose_(self, w_IO: Tensor, upper_I: Tensor, gone_IO: Tensor) -> None:
        """Mark what goes of whole groups of inputs."""
        costs = (w_IO / upper_I[:, None]).square_().masked_fill_(gone_IO, -1)
        groups = costs.view(-1, self._removal.m, costs.shape[1])
        gone_IO |= lowest_in_groups(groups, self._removal.m - self._removal.n).reshape(gone_IO.shape)


Removal = Count | Parts | Groups | Leading
Chooser = CountChooser | PartsChooser | GroupChooser


def chooser_for(removal: Removal, gone_IO: Tensor) -> Chooser | None:
    """What chooses, given which entries are zero already; leading inputs are marked, and nothing is left to choose."""
    if isinstance(removal, Leading):
        gone_IO[: removal.num_inputs] = True
        return None
    if isinstance(removal, Groups):
        return GroupChooser(removal)
    if isinstance(removal, Parts):
        return PartsChooser(removal, gone_IO)
    return CountChooser([removal.num_remove] * (gone_IO.shape[1] if removal.scope == "row" else 1), gone_IO)


def _lowest(costs_IO: Tensor, num_lowest: int) -> Tensor:
    """(I, O) bool: the `num_lowest` smallest of all costs, of equal ones the first by (output, input)."""
    if num_lowest == 0:
        return torch.zeros_like(costs_IO, dtype=torch.bool)
    if costs_IO.device.type == "cpu":  # Several times as fast as torch's sort.
        threshold = float(np.partition(costs_IO.numpy(), num_lowest - 1, axis=None)[num_lowest - 1])
    else:
        threshold = float(costs_IO.flatten().sort().values[num_lowest - 1])
    found = costs_IO <= threshold
    if int(found.sum()) == num_lowest:
        return found
    below = costs_IO < threshold
    tied_OI = (costs_IO == threshold).T.contiguous()
    first_OI = tied_OI.flatten().cumsum(0).view(tied_OI.shape) <= num_lowest - int(below.sum())
    return below | (tied_OI & first_OI).T


def _lowest_of_each(costs_EP: Tensor, num_lowest_P: Tensor) -> Tensor:
    """(E, P) bool: so many of the smallest costs of each of P parts, of equal ones the first."""
    if costs_EP.device.type == "cpu":  # Several times as fast as torch's sort.
        ordered_PE = torch.from_numpy(np.sort(costs_EP.T.contiguous().numpy(), axis=1))
    else:
        ordered_PE = costs_EP.T.sort(dim=1).values
    threshold_P = ordered_PE.gather(1, (num_lowest_P - 1).clamp(min=0)[:, None])[:, 0]
    threshold_P.masked_fill_(num_lowest_P == 0, -1)
    found = costs_EP <= threshold_P
    if torch.equal(found.sum(dim=0), num_lowest_P):
        return found
    below = costs_EP < threshold_P
    tied = costs_EP == threshold_P
    return below | (tied & (tied.cumsum(dim=0) <= num_lowest_P - below.sum(dim=0)))
