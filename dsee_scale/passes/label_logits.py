"""Logits at the positions that have a label, and nowhere else.

With a vocabulary of 50,000 to 250,000 words the output layer costs as much as many blocks, and in
fine-tuning most positions (prompts, padding) have no label. A hook on the output layer hands it only the
hidden states that are needed, as one contiguous row. (The models' own `logits_to_keep` keeps the same
positions of every row, and its non-contiguous slice makes PyTorch copy the weight once per row on CPU:
0.64 s of a 1.2 s forward pass for 8 rows of SmolLM2.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""The label of a position from which nothing is learned."""


def predicting(labels: Tensor) -> Tensor:
    """Where a next token is to be predicted: (batch, time) bool, true at t if there is a label at t + 1."""
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    return wanted


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that gives a transformers model's logits."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


@contextlib.contextmanager
def logits_at(model: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Within this context a forward pass of `model` returns logits of shape (1, wanted.sum(), vocabulary).

    A model whose output layer is not found or not called keeps its full logits; `select_logits` reads both.

    Args:
        model: a transformers model, not wrapped by an engine.
        wanted: (batch, time) bool, in the order in which logits are returned.
    """
    head = output_layer(model)
    if head is None:
        yield
        return

    def keep_wanted(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != wanted.shape:
            return None
        return (hidden[wanted].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_wanted)
    try:
        yield
    finally:
        handle.remove()


def select_logits(logits: Tensor, wanted: Tensor) -> Tensor:
    """The wanted logits as float32 (wanted.sum(), vocabulary), from reduced or full ones."""
    if logits.shape[:2] == wanted.shape and logits.shape[:2] != (1, int(wanted.sum())):
        logits = logits[wanted]
    return logits.reshape(-1, logits.shape[-1]).float()


def label_loss(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of the next tokens.

    Args:
        logits: as `logits_at` or a plain forward pass gives them.
        labels: (batch, time), -100 where nothing is learned.
        num_items: labels in the whole step over all ranks and micro-batches; the sum is divided by it. None
            divides by the labels here.
        smoothing: label smoothing in [0, 1).

    Returns:
        A scalar; zero, with a graph, if there is no label.
    """
    wanted = predicting(labels)
    targets = labels[:, 1:][wanted[:, :-1]].long()
    chosen = select_logits(logits, wanted)
    total = functional.cross_entropy(chosen, targets, reduction="sum", label_smoothing=smoothing)
    count = targets.numel() if num_items is None else num_items
    return total / (count if isinstance(count, Tensor) else max(1, count))
