"""Hooks on linear layers that hand out what they read, and sums of its squares.

Layers that are called with the same tensors throughout (q, k and v; gate and up) share one record.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.targets import linear_kind
from dsee_scale.algorithms.score import sum_of_squares
from dsee_scale.distributed import gather_objects
from dsee_scale.partition import Partition
from dsee_scale.passes.decompose_model import explain_shortage
from dsee_scale.passes.inputs.masks import Kept, token_mask
from dsee_scale.passes.routed import Routed

Take = Callable[[str, Tensor], None]
TO_LOWER = "the number of tokens in a calibration batch"


class InputSquares:
    """Sums of the squares of the layers' inputs; what `watching` hands out."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[Tensor, int]

    def take(self, name: str, x_TI: Tensor) -> None:
        """Add one call's input of a layer. Local."""
        self._last = sum_of_squares(x_TI), x_TI.shape[0]
        self.again(name)

    def again(self, name: str) -> None:
        """Add to a layer what was taken last. Local."""
        total, tokens = self._last
        self._sums[name] = self._sums[name].add_(total) if name in self._sums else total.clone()
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def reduce(
        self, layers: Mapping[str, nn.Module], leaders: Mapping[str, str], partition: Partition
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Collective. Sums and tokens over all ranks, every layer with an entry; those of one leader share it."""
        squares: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name in layers:
            leader = leaders[name]
            if leader in squares:
                squares[name], counts[name] = squares[leader], counts[leader]
                continue
            width = _num_inputs(layers[name], partition)
            mine = self._sums.get(leader, torch.zeros(width, dtype=torch.float64))
            tokens = torch.tensor([self._tokens.get(leader, 0)], dtype=torch.float64)
            total = partition.sum_over_ranks(torch.cat([mine.cpu(), tokens]))
            squares[name], counts[name] = total[:-1].float(), int(total[-1])
        return squares, counts


def _num_inputs(layer: nn.Module, partition: Partition) -> int:
    rows, cols = partition.shape(layer.weight)  # type: ignore[arg-type]
    return int(rows if linear_kind(layer) == "conv1d" else cols)


def agreed_leaders(read: Mapping[str, bytes], names: Iterable[str]) -> dict[str, str]:
    """Collective. Under whose name each layer's inputs are collected, the same on all ranks: the first one's.

    Layers have one leader if on every rank they were called with the same inputs, `Watch.read`, or with none. One that
    no token reaches at all stands alone.
    """
    first: dict[bytes, str] = {}
    everyone = gather_objects({name: first.setdefault(inputs, name) for name, inputs in read.items()})
    leaders: dict[tuple[str | None, ...], str] = {}
    keys = {name: tuple(one.get(name) for one in everyone) for name in names}
    return {name: leaders.setdefault(key, name) if any(key) else name for name, key in keys.items()}


class Watch:
    """Pre-forward hooks on linear layers that hand out each layer's inputs, without the padding.

    Attributes:
        read: module name -> digest of the inputs that it was called with, in order, over batches that count.
        problem: what failed, or why tokens of a batch that has run can't be told from padding; the first that was
            found. Raise it on all ranks before anything is done with what was handed out.
    """

    def __init__(self, take: Take, again: Callable[[str], None] | None) -> None:
        self.read: dict[str, bytes] = {}
        self.problem: Exception | None = None
        self._take, self._again = take, again
        self._counts = True
        self._kept = Kept(None)
        self._last: tuple[Tensor, int] | None = None
        self._number = 0

    @contextlib.contextmanager
    def batch(self, batch: Any, counts: bool = True) -> Iterator[None]:
        """While this batch runs; one that does not count runs for the other ranks' sake alone."""
        self._counts = counts
        self._safely("a batch", self._begin, batch)
        try:
            yield
            self.problem = self.problem or self._kept.problem()
        finally:
            self._last = None

    def see(self, name: str, x: Tensor) -> None:
        """One layer is about to read x, (..., I)."""
        if x.numel():  # experts may be called with no token
            self._safely(name, self._see, name, x)

    def see_routed(self, name: str, sums: Routed, values: tuple[Any, ...]) -> None:
        """A module with experts is about to be called with these values."""
        self._safely(name, self._see_routed, name, sums, values)

    def _safely(self, of: str, look: Callable[..., None], *given: Any) -> None:
        """Once something failed here nothing more is looked at: the other ranks wait within this forward pass."""
        if not self._counts or self.problem is not None:
            return
        try:
            look(*given)
        except Exception as error:
            self.problem = explain_shortage(error, f"at the inputs of {of}", TO_LOWER)

    def _begin(self, batch: Any) -> None:
        self._kept = Kept(token_mask(batch))

    def _see(self, name: str, x: Tensor) -> None:
        again = self._last is not None and _same(*self._last, x)
        if not again:
            # The tensor is held on to, so that no other one can lie at its address meanwhile.
            self._last = (x, version_of(x))
            self._number += 1
        self.read[name] = hashlib.blake2b(
            self.read.get(name, b"") + self._number.to_bytes(8, "little"), digest_size=16
        ).digest()
        kept = self._kept.of(name, x.shape[:-1])
        if again and self._again is not None:
            self._again(name)
            return
        self._take(name, (x if kept is None else x[kept.to(x.device)]).reshape(-1, x.shape[-1]))

    def _see_routed(self, name: str, sums: Routed, values: tuple[Any, ...]) -> None:
        kept = self._kept.of(name, values[0].shape[:-1])
        sums.add(values, None if kept is None else kept.reshape(-1))


def version_of(x: Tensor) -> int:
    """A number that each change in place raises; of inference tensors, whose changes nobody counts, -1."""
    return -1 if x.is_inference() else x._version


def _same(last: Tensor, version: int, x: Tensor) -> bool:
    """Whether x holds what the last one did when it was read; of inference tensors, whose changes nobody counts, never.

    DeepSpeed's hooks hand on the same entries as another tensor.
    """
    if x.is_inference() or x._version != version:
        return False
    layouts = [(each.data_ptr(), each.dtype, each.shape, each.stride()) for each in (last, x)]
    return layouts[0] == layouts[1]


@contextlib.contextmanager
def watching(
    layers: Mapping[str, nn.Module],
    take: Take,
    experts: Mapping[str, Routed] | None = None,
    again: Callable[[str], None] | None = None,
) -> Iterator[Watch]:
    """Hooks on the layers, and on modules with experts, for as long as the context lasts.

    Args:
        layers: by name.
        take: is given every layer's input at every call, (T, I).
        experts: see `RoutedSums` and `RoutedInputs`.
        again: is called in place of `take` for a layer that reads what was taken last.
    """
    watch = Watch(take, again)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: watch.see(name, args[0] if args else next(iter(kwargs.values())))

    def routed(name: str, sums: Routed) -> Callable[..., None]:
        return lambda _, args, kwargs: watch.see_routed(name, sums, (*args, *kwargs.values()))

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    handles += [
        sums.module.register_forward_pre_hook(routed(name, sums), with_kwargs=True)
        for name, sums in (experts or {}).items()
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
