"""Calibration batches that would leave other ranks waiting: told before they run, or said on every rank."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import CalibrationError, DSEEError, TargetError
from dsee_scale.partition import Partition


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


def problem(module: nn.Module, batch: Any, partition: Partition) -> CalibrationError | None:
    """Why a batch is no input of the model, as far as that can be told without running it; None if it may be. Local."""
    found = _problem(module, batch, partition)
    if found is None:
        return None
    return CalibrationError(
        f"a calibration batch of rank {partition.rank} is no input of the model: {found}. Nothing was changed"
    )


def _problem(module: nn.Module, batch: Any, partition: Partition) -> str | None:
    signature = inspect.signature(module.forward).parameters
    if isinstance(batch, (tuple, list)):
        return None
    if not isinstance(batch, Mapping):
        if not isinstance(batch, Tensor):
            return f"expected a mapping, a tuple or a tensor of token ids, found {type(batch).__name__}"
        batch = {next(iter(signature)): batch}
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.values())
    unknown = [str(key) for key in batch if key != "labels" and key not in signature]
    if unknown and not takes_all:
        return f"{type(module).__name__} takes no {', '.join(unknown)}"
    return _ids_problem(module, batch, partition)


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
    return None


def _vocabulary(module: Any, partition: Partition) -> int | None:
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, nn.Embedding):
        return None
    weight: Any = embedding.weight
    return int(partition.shape(weight)[0])


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
