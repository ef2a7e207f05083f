"""Run a model block after block over calibration data, each block on what the ones before it give.

A block runs through its own hooks, so under ZeRO-3 its weights come and go as in training. What a block is called
with besides its input (masks, position embeddings) is caught from one whole forward pass of each batch.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.algorithms.score import all_finite
from dsee_scale.errors import CalibrationError, TargetError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.passes.batches import (
    NOT_FINITE,
    Batches,
    compute_device,
    in_step,
    map_tensors,
    run_model,
    to_device,
)
from dsee_scale.passes.decompose_model import explain_shortage
from dsee_scale.passes.inputs.masks import token_mask
from dsee_scale.passes.inputs.watch import version_of

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_SINGLE = "hidden_states"
NO_SUCCESSOR = "does not simply continue from the block before it"
TO_LOWER = "the number of calibration batches on each rank, or set inputs_on_cpu"
"""Where memory ends for what is kept between blocks."""
CHANGES = "changes in place what it is called with beside its input"
READS_BESIDE = "reads what an earlier block made beside its output, such as shared keys and values"


@dataclass
class Call:
    """How one batch calls every block.

    Attributes:
        batch: the batch, for its mask.
        counts: whether its tokens count on this rank.
        hidden: (B, T, hidden size), input of the block that is next, where `capture` was told to keep it.
        arguments: for each block, the further positional and keyword arguments, kept where `hidden` is.
        keywords: for each block, whether the input is passed by keyword.
        tuned: (B, T, hidden size), what the model before its pruning gives in place of `hidden`, where that is asked.
    """

    batch: Any
    counts: bool
    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    keywords: list[bool] = field(default_factory=list)
    tuned: Tensor | None = None


def find_blocks(module: nn.Module, wanted: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The repeated blocks that hold the wanted modules, all of their list, in order.

    Raises:
        TargetError: some lie outside of one list of blocks, or two blocks or two layers of one share a weight.
    """
    lists = [name for name, each in module.named_modules() if isinstance(each, nn.ModuleList) and len(each)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    holding = [name for name in outermost if any(each.startswith(name + ".") for each in wanted)]
    outside = [each for each in wanted if not any(each.startswith(name + ".") for name in holding)]
    if len(holding) != 1 or outside:
        found = outside[0] if outside else " and ".join(holding)
        raise TargetError(
            f"refit goes block after block through one list of blocks (nn.ModuleList), and {found} "
            f"{'lies outside of it' if outside else 'are several'}; leave it out with `modules`, or set refit=False"
        )
    blocks = module.get_submodule(holding[0])
    named = [(f"{holding[0]}.{index}", block) for index, block in blocks.named_children()]
    _reject_shared(named, module, wanted)
    return named


def _reject_shared(blocks: Sequence[tuple[str, nn.Module]], module: nn.Module, wanted: Sequence[str]) -> None:
    """A weight that is solved for one layer's inputs would change under another layer or block that has it too."""
    names, params = set(wanted), module.named_parameters(remove_duplicate=False)
    solved = {id(param) for name, param in params if not names.isdisjoint((name, name.rpartition(".")[0]))}
    first: dict[int, tuple[str, str]] = {}
    for name, block in blocks:
        for layer, owner in block.named_modules(prefix=name):
            for own, param in owner.named_parameters(prefix=layer, recurse=False):
                there = first.setdefault(id(param), (name, layer))
                if there == (name, layer) or id(param) not in solved:
                    continue
                kind, one, other = "block", name, there[0]
                if one == other:
                    kind, one, other = "layer", layer, there[1]
                what = own.removeprefix(f"{one}.")
                raise TargetError(
                    f"{one} and {other} share {what}, and refit solves a weight for one {kind}'s inputs; leave it out "
                    "with `modules`, give each its own copy, or set refit=False. Nothing was removed"
                )


def capture(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Batches,
    partition: Partition,
    storage: torch.device,
    around: Callable[[Any, bool], AbstractContextManager[None]] = lambda *_: contextlib.nullcontext(),
) -> list[Call]:
    """Collective. How each batch calls the blocks; equally many on every rank.

    Args:
        model: what `prune` was given.
        blocks: name and module of each.
        batches: this rank's model inputs.
        partition: port to the weights.
        storage: where inputs and all else that blocks are called with are kept between blocks.
        around: a context for each batch's forward pass, given the batch and whether it counts.

    Raises:
        TargetError: a block does not simply go on from the one before it, or reads what one made beside its output.
        CalibrationError: a rank without batches, a batch that is no input, or activations that are not finite.
    """
    calls: list[Call] = []
    error: Exception | None = None
    broken: str | None = None
    for batch, counts in in_step(unwrap(model), batches, partition):
        watch = _Capture(blocks, storage)
        try:
            with around(batch, counts):
                run_model(model, batch, partition)
        finally:
            watch.close()
        if watch.failed is not None:  # the others go on: follow, with what room there is, then fail together
            error = error or explain_shortage(watch.failed, "while keeping the blocks' inputs", TO_LOWER)
            calls.clear()
            continue
        calls.append(Call(batch, counts, watch.hidden, watch.arguments, watch.keywords))
        try:
            if counts and not _finite(watch.last, token_mask(batch)):
                error = error or CalibrationError(NOT_FINITE)
        except Exception as failure:  # memory, e.g.: the others are told below
            error = error or failure
        if watch.broken is None and len(watch.arguments) != len(blocks):
            watch.broken = f"{blocks[len(watch.arguments)][0]} {NO_SUCCESSOR}"
        broken = broken or watch.broken
    # Before the first block is written: what comes later would leave the model half pruned.
    if broken is not None:
        error = TargetError(
            f"{broken}, so the model can't be re-fitted block after block; set refit=False. Nothing was removed"
        )
    partition.raise_first(error)
    return calls


def _finite(output: Tensor | None, mask: Tensor | None) -> bool:
    """Whether the last block's output is finite wherever tokens count."""
    if output is None:
        return True
    counted = output if mask is None or mask.shape != output.shape[:2] else output[mask.to(output.device)]
    return all_finite(counted)


class _Capture:
    """Hooks that note how the blocks are called in one forward pass."""

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]], storage: torch.device) -> None:
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.keywords: list[bool] = []
        self.hidden = torch.empty(0)
        self.broken: str | None = None
        self._names = [name for name, _ in blocks]
        self._storage = storage
        self._stored: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._beside: list[weakref.ref[Tensor]] = []
        self._contents: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.last: Tensor | None = None
        self.failed: Exception | None = None
        self._handles = []
        for index, (_, block) in enumerate(blocks):
            before = functools.partial(self._before, index)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._after))

    def _before(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changes nothing once something failed here: the other ranks wait within this forward pass."""
        try:
            return self._noted(index, args, kwargs) if self.failed is None else None
        except (MemoryError, RuntimeError) as error:  # what PyTorch raises without memory
            self.failed, self.arguments, self._stored = error, [], {}
            return None

    def _noted(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(self.arguments):  # one that is used twice, left out, or called out of turn
            self._break(index, NO_SUCCESSOR)
        rest = {key: None if key in CACHES else value for key, value in kwargs.items()}
        if "use_cache" in rest:
            rest["use_cache"] = False
        by_keyword = not args
        hidden: Tensor = rest.pop(_SINGLE) if by_keyword else args[0]  # type: ignore[assignment]
        if not self.arguments:
            # A block may add to its input in place.
            self.hidden = hidden.detach().to(self._storage, copy=True)
        elif self.last is None or not _same(hidden, self.last):
            self._break(index, NO_SUCCESSOR)
        # A cache holds what the captured pass put there; some models pass it by position.
        further = tuple(None if _is_cache(each) else each for each in args[1:])
        if any([self._has_changed(each) for each in (*further, *rest.values())]):
            self._break(index, READS_BESIDE)
        self.arguments.append((self._kept(further), self._kept(rest)))
        self.keywords.append(by_keyword)
        watched = functools.partial(self._watched, lambda: self._break(index, READS_BESIDE))
        return (*args[:1], *map(watched, args[1:])), {key: watched(each) for key, each in kwargs.items()}

    def _watched(self, read: Callable[[], None], value: Any) -> Any:
        """An argument; one that an earlier block returned beside its output tells when this one reads it."""
        if isinstance(value, Tensor):
            return _Watched.of(value, read) if self._is_made(value) else value
        if type(value) in (tuple, list):
            return type(value)(self._watched(read, each) for each in value)
        return value

    def _kept(self, value: Any) -> Any:
        """Tensors in storage; those that all blocks share, such as masks, once."""
        if isinstance(value, Tensor):
            value = value.plain if isinstance(value, _Watched) else value
            if id(value) not in self._stored:
                # The model may write the next batch's into it. It is held on to, so that no other one gets its id.
                copied = value.detach().to(self._storage, copy=True)
                self._stored[id(value)] = (value, copied, version_of(value))
            return self._stored[id(value)][1]
        return map_tensors(self._kept, value)

    def _break(self, index: int, reason: str) -> None:
        self.broken = self.broken or f"{self._names[index]} {reason}"

    def _has_changed(self, value: Any) -> bool:
        """Whether a mapping that blocks share holds something else than when one was called with it before."""
        if not isinstance(value, Mapping):
            return False
        now = dict(value)
        _, before = self._contents.setdefault(id(value), (value, now))  # held on to, as in `_kept`
        return before.keys() != now.keys() or any(before[key] is not now[key] for key in now)

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.last = first_tensor(output)
        if any(version_of(each) != version for each, _, version in self._stored.values()):
            self._break(len(self.arguments) - 1, CHANGES)
        for each in output[1:] if isinstance(output, (tuple, list)) else ():
            made = each if isinstance(each, (tuple, list)) else (each,)
            self._beside += [
                weakref.ref(one) for one in made if isinstance(one, Tensor) and self._is_new(one)
            ]

    def _is_made(self, value: Tensor) -> bool:
        """Whether an earlier block returned it; DeepSpeed's hooks hand on the same entries as another tensor."""
        alive = [each for made in self._beside if (each := made()) is not None]
        return isinstance(value, _Watched) or any(_same_place(each, value) for each in alive)

    def _is_new(self, value: Tensor) -> bool:
        """Whether it is none that a block was called with and hands through."""
        return self._is_made(value) or not any(_same_place(each, value) for each, *_ in self._stored.values())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _same_place(one: Tensor, other: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return one.data_ptr() == other.data_ptr() and one.shape == other.shape


class _Watched(Tensor):
    """A tensor that tells when something is computed from it."""

    plain: Tensor
    read: Callable[[], None]

    @staticmethod
    def of(value: Tensor, read: Callable[[], None]) -> _Watched:
        """The same entries."""
        plain = value.plain if isinstance(value, _Watched) else value
        found = plain.as_subclass(_Watched)
        found.plain, found.read = plain, read
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a tensor would do; its shape, type and the like say nothing about its entries."""
        name = func.__self__.__name__ if func.__name__ == "__get__" else ""
        if name not in ("shape", "ndim", "dtype", "device", "requires_grad", "grad_fn", "is_cuda"):
            _tell_read([*args, *(kwargs or {}).values()])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _tell_read(values: Sequence[Any]) -> None:
    for each in values:
        if isinstance(each, _Watched):
            each.read()
        elif isinstance(each, (tuple, list)):
            _tell_read(each)


def _is_cache(value: Any) -> bool:
    """Whether this is one of transformers' caches (told by its class's name: importing them costs a second)."""
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    )


def run_block(
    block: nn.Module, index: int, call: Call, hidden: Tensor, module: nn.Module, partition: Partition
) -> Tensor:
    """Output of one block for one batch, where the model computes. Under ZeRO-3 collective."""
    device = compute_device(module, partition)
    args, kwargs = call.arguments[index]
    inputs = hidden.to(device, copy=True)
    args, kwargs = to_device(args, device), to_device(kwargs, device)
    if call.keywords[index]:
        return first_tensor(block(*args, **{_SINGLE: inputs}, **kwargs))
    return first_tensor(block(inputs, *args, **kwargs))


def first_tensor(output: Any) -> Tensor:
    """A block's output without what some return beside it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def advance(
    block: nn.Module, index: int, calls: Sequence[Call], module: nn.Module, partition: Partition
) -> None:
    """Replace each call's `hidden` by the block's output, batch by batch. Under ZeRO-3 collective."""
    for call in calls:
        call.hidden = run_block(block, index, call, call.hidden, module, partition).to(call.hidden.device)
