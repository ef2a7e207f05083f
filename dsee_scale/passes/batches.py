"""Calibration batches: read in step by all ranks, checked before they run, run through the model as it is.

What would leave other ranks waiting is told before it runs, or said on every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import CalibrationError, DSEEError, TargetError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.passes.inputs.masks import mask_problem, num_counted
from dsee_scale.passes.label_logits import logits_at

NO_TOKEN = (
    "no token of the calibration batches counts: their attention masks leave out everything; expected at least one "
    "token. Nothing was changed"
)
NOT_FINITE = (
    "the model's activations on the calibration batches hold NaN or infinity; check the batches and the model's "
    "weights. Nothing was changed"
)
Batches = Iterable[Any]
NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)
_END: Any = object()
POSITIONS = ("wpe", "position_embeddings", "embed_positions")
"""Names of embeddings of positions: GPT-2's, BERT's and RoBERTa's, OPT's."""


def reject_encoder_decoder(module: nn.Module) -> None:
    """Refuse models whose layers see two sequences, of which a batch's mask describes one. Local.

    Raises:
        TargetError: naming the way out.
    """
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{type(module).__name__} is an encoder with a decoder, and a batch's attention mask says of the encoder "
            "alone which tokens count; expected a decoder or an encoder: choose a score that looks at no activations, "
            "such as score='W'"
        )


def named(module: nn.Module, batch: Any) -> Any:
    """A batch as keyword arguments: a tuple's members by the names that the model's forward gives them. Local.

    So a mask is found, whichever way it is passed. A tensor is a tuple of one. What has no names stays as it is.
    Integer labels become int64, which losses take; `logits_to_keep` is left out, since the passes choose it themselves.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, (tuple, list)):
        names = _positional(module)
        if len(batch) > len(names):
            return batch
        batch = dict(zip(names, batch, strict=False))
    if not isinstance(batch, Mapping):
        return batch
    found = {key: value for key, value in batch.items() if key != "logits_to_keep"}
    labels = found.get("labels")
    if isinstance(labels, Tensor) and labels.dtype in NARROW:
        found["labels"] = labels.long()
    return found


def _positional(module: nn.Module) -> list[str]:
    """The parameters of the model's forward that may be passed by position or by name."""
    parameters = inspect.signature(module.forward).parameters.values()
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [each.name for each in itertools.takewhile(lambda each: each.kind is either, parameters)]


def problem(module: nn.Module, batch: Any, partition: Partition) -> CalibrationError | None:
    """Why a batch, `named`, is no input of the model, as far as that can be told without running it. Local."""
    found = _problem(module, batch, partition)
    if found is None:
        return None
    return CalibrationError(
        f"a calibration batch of rank {partition.rank} is not an input of the model: {found}. Nothing was changed"
    )


def _problem(module: nn.Module, batch: Any, partition: Partition) -> str | None:
    signature = inspect.signature(module.forward).parameters
    kinds = {each.kind for each in signature.values()}
    if isinstance(batch, (tuple, list)):
        if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
            return None
        return f"{type(module).__name__} takes {len(_positional(module))} values, found {len(batch)}"
    if not isinstance(batch, Mapping):
        return f"expected a mapping, a tuple or a tensor of token ids, found {type(batch).__name__}"
    unknown = [str(key) for key in batch if key != "labels" and key not in signature]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"{type(module).__name__} takes no {', '.join(unknown)}"
    return mask_problem(batch) or _ids_problem(module, batch, partition)


def _ids_problem(module: nn.Module, batch: Mapping[str, Any], partition: Partition) -> str | None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 2:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        return f"input_ids are {found}, expected a tensor of integers, batch x tokens"
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape:
        return f"attention_mask is {tuple(mask.shape)}, and input_ids are {tuple(ids.shape)}"
    if not ids.numel():
        return "input_ids are empty"
    words = _vocabulary(module, partition)
    low, high = (int(edge) for edge in torch.aminmax(ids))
    if words is not None and not 0 <= low <= high < words:
        return f"input_ids go from {low} to {high}, and the model knows 0 to {words - 1}"
    tokens, positions = learned_positions(module)
    if tokens is not None and ids.shape[1] > tokens and batch.get("position_ids") is None:
        return f"input_ids are {ids.shape[1]} tokens long, and the model has positions for {tokens}"
    types = getattr(getattr(module, "config", None), "type_vocab_size", None)
    limits = {"position_ids": positions, "token_type_ids": types}
    wrong = (_beside_problem(name, batch.get(name), ids, limit) for name, limit in limits.items())
    return next(filter(None, wrong), None)


def _beside_problem(name: str, found: Any, ids: Tensor, limit: int | None) -> str | None:
    """What is wrong with integers that go with the tokens one by one."""
    if not isinstance(found, Tensor) or found.dim() > 2:
        return None
    if found.is_floating_point() or found.shape not in (ids.shape, ids[:1].shape, ids[0].shape):
        return f"{name} are {found.dtype} of shape {tuple(found.shape)}, and input_ids are {tuple(ids.shape)}"
    low, high = (int(edge) for edge in torch.aminmax(found))
    if limit and not 0 <= low <= high < limit:
        return f"{name} go from {low} to {high}, and the model knows 0 to {limit - 1}"
    return None


def learned_positions(module: nn.Module) -> tuple[int | None, int | None]:
    """Tokens that a model with learned positions takes at most, and how many positions may be named to it."""
    words = _word_embedding(module)
    beside = {name.rpartition(".")[0] for name, each in module.named_modules() if each is words}
    for name, each in module.named_modules():
        outer, _, own = name.rpartition(".")
        # Those of an encoder of pictures or of sound count no tokens of text.
        if isinstance(each, nn.Embedding) and own in POSITIONS and (words is None or outer in beside):
            unused = 0 if each.padding_idx is None else each.padding_idx + 1
            count, offset = each.num_embeddings, getattr(each, "offset", None)
            return (count - unused, count) if offset is None else (count - int(offset), count - int(offset))
    return None, None


def _word_embedding(module: Any) -> nn.Embedding | None:
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _vocabulary(module: nn.Module, partition: Partition) -> int | None:
    embedding: Any = _word_embedding(module)
    return None if embedding is None else int(partition.shape(embedding.weight)[0])


@contextlib.contextmanager
def together(partition: Partition) -> Iterator[None]:
    """A forward pass that fails is a CalibrationError; collective at its end where the weights are replicas."""
    with raise_on_all_ranks(partition) if partition.replicated else contextlib.nullcontext():
        try:
            yield
        except DSEEError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise CalibrationError(
                f"a calibration batch of rank {partition.rank} does not run through the model: "
                f"{type(error).__name__}: {reason}. Nothing was changed"
            ) from error


def reject_uncounted(batches: Sequence[Any], partition: Partition) -> None:
    """Collective. Refuse batches without a token that counts, or a rank without batches.

    Raises:
        CalibrationError: the same on every rank.
    """
    counted = sum(map(num_counted, batches))
    tokens, empty = partition.sum_over_ranks(torch.tensor([counted, int(not batches)])).tolist()
    _reject_empty(empty, partition)
    if not tokens:
        raise CalibrationError(NO_TOKEN)


def _reject_empty(empty: int, partition: Partition) -> None:
    if empty:
        raise CalibrationError(
            f"{empty} of {partition.world_size} ranks have no calibration batch; expected at least one on every "
            "rank: give fewer samples to each batch, or more data"
        )


def reject_lone_batch(batches: Any) -> None:
    """One batch would be iterated by key or by row. Local."""
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise CalibrationError(
            f"calibration is a {type(batches).__name__}; expected an iterable of batches, such as [batch]"
        )
    if isinstance(batches, (Mapping, Tensor)):
        raise CalibrationError(
            f"calibration is one batch (a {type(batches).__name__}); expected an iterable of batches, such as [batch]"
        )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode throughout; afterwards every submodule is in the mode that it was in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model without torch.compile's code, which skips hooks that are younger than it. Local."""
    compiled = any(map(_is_compiled, model.modules()))  # importing the compiler takes seconds
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is compiled by `compile()`, by torch.compile as a whole, or by its forward alone."""
    by_call = getattr(module, "_compiled_call_impl", None) is not None
    return by_call or hasattr(module, "_orig_mod") or hasattr(module.forward, "_torchdynamo_orig_callable")


def in_step(module: nn.Module, batches: Batches, partition: Partition) -> Iterator[tuple[Any, bool]]:
    """Collective. Each rank's batches, `named`, as many rounds as the rank with most has; (batch, whether it counts).

    A rank that has run out repeats its last one without counting it: under ZeRO-3 the others wait for its weights.

    Raises:
        CalibrationError: a rank has no batch at all, or one that is no input of the model.
    """
    left: Iterator[Any] | None = None
    batch = last = _END
    while True:
        wrong = None
        try:
            left = iter(batches) if left is None else left
            if (batch := next(left, _END)) is not _END:
                batch = named(module, batch)
                wrong = problem(module, batch, partition)
        except Exception as error:
            wrong = CalibrationError(f"a calibration batch cannot be read: {type(error).__name__}: {error}")
        state = [batch is not _END, batch is _END and last is _END, wrong is not None]
        going, empty, broken = partition.sum_over_ranks(torch.tensor(state, dtype=torch.int64)).tolist()
        if broken:
            partition.raise_first(wrong)
        _reject_empty(empty, partition)
        if not going:
            return
        last = last if batch is _END else batch
        yield last, batch is not _END
        release_heap(module, partition)


def run_model(model: nn.Module, batch: Any, partition: Partition, *, short_logits: bool = True) -> None:
    """Collective. One forward pass of one batch.

    Args:
        model: what the pass was given.
        batch: as `in_step` gives it, on any device; its labels are left out.
        partition: port to the weights.
        short_logits: compute those of one token alone, since nobody reads them: over a large vocabulary they cost as
            much as several blocks.

    Raises:
        CalibrationError: it fails; on every rank where the weights are replicas. Under ZeRO-3 the others wait for the
            weights of a rank that leaves its forward pass, until its process ends. So `in_step` tells what can be told
            before: token ids, masks, positions and types that no model takes. What stays is what a model makes of
            inputs of its own, and errors of the device.
    """
    module = unwrap(model)
    with together(partition):
        batch = to_device(batch, compute_device(module, partition))
        if isinstance(batch, (tuple, list)):
            model(*batch, **no_cache(module))
            return
        inputs = {key: value for key, value in batch.items() if key != "labels"} | no_cache(module)
        if not short_logits or not isinstance(ids := inputs.get("input_ids"), Tensor):
            model(**inputs)
            return
        first = torch.arange(ids.numel(), device=ids.device).view(ids.shape) == 0
        with logits_at(module, first):
            model(**inputs)


def no_cache(module: nn.Module) -> dict[str, bool]:
    """What a forward pass is given, if it takes it: with a cache, transformers sees packed documents as one. Local."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def compute_device(module: nn.Module, partition: Partition) -> torch.device:
    """Where the model computes."""
    return partition.compute_device(next(module.parameters()))


def release_heap(module: nn.Module, partition: Partition) -> None:
    """Hand memory that was freed back to the system, where the CPU computes and the C library is glibc's.

    It keeps what lies between pieces that are still held, and over many batches, each of another shape, that becomes
    several times what is in use.
    """
    if (trim := _malloc_trim()) is not None and compute_device(module, partition).type == "cpu":
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # no glibc
        return None


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return map_tensors(lambda each: to_device(each, device), value)


def map_tensors(change: Callable[[Any], Any], value: Any) -> Any:
    """Change the members of a mapping, a list or a tuple; anything else stays as it is."""
    if isinstance(value, Mapping):
        return {key: change(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(change(each) for each in value)
    return value
