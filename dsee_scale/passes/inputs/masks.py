"""Which tokens of a batch count, and which rows of a layer's input these are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsee_scale.errors import CalibrationError

LEFT_OUT = -9e3
"""What is added to a score of attention that is to be nothing is less: minus infinity, or -10000 in older models."""
EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")
WAY_OUT = "give batches without padding, such as rows of one length"


def token_mask(batch: Any) -> Tensor | None:
    """(B, T) bool, which tokens of a batch count; None for all, or where `mask_problem` says what is wrong."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask.bool()
    kept = _kept_keys(mask)
    if isinstance(kept, str):
        return None
    return kept.expand(_size(batch, kept)[0], -1) if len(kept) == 1 else kept


def num_counted(batch: Any) -> int:
    """Tokens of a batch that its mask keeps, 1 without one. Local."""
    mask = token_mask(batch)
    return 1 if mask is None else int(mask.sum())


def mask_problem(batch: Mapping[str, Any]) -> str | None:
    """Why a batch's attention mask does not say which tokens are padding, None if it does. Local."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    shapes = "batch x tokens, or batch x 1 x queries x keys"
    if not isinstance(mask, Tensor):
        return f"attention_mask is a {type(mask).__name__}, expected a tensor, {shapes}"
    if mask.dim() not in (2, 4):
        return f"attention_mask is of shape {tuple(mask.shape)}, expected {shapes}"
    if mask.dim() == 2:
        return None
    kept = _kept_keys(mask)
    if isinstance(kept, str):
        return f"attention_mask (batch x 1 x queries x keys) {kept}; expected batch x tokens, 1 for those that count"
    rows, tokens = _size(batch, kept)
    if kept.shape[1] != tokens:
        return f"attention_mask has {kept.shape[1]} keys, and input_ids are {(rows, tokens)}"
    return (
        f"attention_mask has {len(kept)} rows, and the batch {rows}" if len(kept) not in (1, rows) else None
    )


def _size(batch: Mapping[str, Any], kept: Tensor) -> tuple[int, int]:
    """Rows and tokens of a batch, as far as it says them."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := batch.get(name), Tensor) and found.dim() >= 2:
            return found.shape[0], found.shape[1]
    return kept.shape[0], kept.shape[1]


def _kept_keys(mask: Tensor) -> Tensor | str:
    """(B or 1, K) bool, keys that some query sees, of a mask of queries and keys; or why that tells no padding."""
    if mask.dtype == torch.bool:
        seen = mask
    elif not mask.is_floating_point():
        return f"is of {mask.dtype}, which some models add to the scores and others don't take"
    elif not bool((mask <= 0).all()):
        return "holds values above 0, and is added to the scores, so 1 may leave out or keep"
    else:
        seen = mask > LEFT_OUT
    all_keys = seen.all(-1)
    # Queries on padding that would see nothing are often given everything; the last one of a row may.
    if bool((all_keys[..., :-1].any(-1) & ~all_keys.all(-1)).any()):
        return "has queries that see every key among others that don't"
    return seen.flatten(1, 2).any(1)


class Kept:
    """Which rows of layers' inputs are tokens that count, over one batch; and layers where that can't be told.

    A layer reads all tokens, or chunks along the sequence that add up to them. What it reads beside them, such as
    embeddings of positions, counts whole.
    """

    def __init__(self, mask: Tensor | None) -> None:
        """(B, T) bool, None for all."""
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._fit: set[str] = set()
        self._towers: set[str] = set()
        self._chunks: dict[str, int] = {}
        self._other: dict[str, tuple[int, ...]] = {}

    def of(self, name: str, lead: torch.Size) -> Tensor | None:
        """Bool, of the first dimensions of one call's input, (*lead, I): what counts; None for all."""
        mask = self._mask
        if mask is None or not lead.numel():
            return None
        tower = _tower(name)
        if (fits := fitting(mask, lead, tower in self._towers)) is not None:
            self._fit.add(name)
            self._towers.add(tower)
            return fits
        # One row that is longer than the batch's, where layers read that: positions.
        longer = len(lead) == 2 and lead[0] == len(mask) == 1 and lead[1] > mask.shape[1]
        if name in self._fit or _stands_apart(name, lead, mask) or (longer and tower in self._towers):
            return None
        self._other.setdefault(name, tuple(lead))
        if len(lead) != 2 or lead[0] != len(mask) or tower not in self._towers:
            return None
        start = self._chunks.get(name, 0)
        self._chunks[name] = stop = start + lead[1]
        return mask[:, start:stop] if stop <= mask.shape[1] else None

    def problem(self) -> CalibrationError | None:
        """What to raise once the batch has run. Local."""
        for name, lead in self._other.items():
            assert self._mask is not None
            rows, tokens = self._mask.shape
            # Chunks that turn out to be none have left out rows of what is read beside the tokens.
            fine = name not in self._chunks if name in self._fit else self._chunks.get(name) == tokens
            if not fine and (_tower(name) in self._towers or not self._towers):
                return CalibrationError(
                    f"{name} reads inputs of shape {lead}, and which of them are padding can't be told from an "
                    f"attention mask of {rows} x {tokens} tokens; expected inputs of shape {(rows, tokens)}, or chunks "
                    f"along the sequence that add up to it: {WAY_OUT}. Nothing was changed"
                )
        return None


def fitting(mask: Tensor, lead: torch.Size, beside: bool = False) -> Tensor | None:
    """The mask (B, T) in the order of an input of all tokens: by rows, the sequence first, or flat; None for others.

    Beside layers that read all tokens one row of as many vectors is something else, such as DeBERTa's positions.
    """
    if lead[:2] in (mask.shape, mask.t().shape):
        return mask if lead[:2] == mask.shape else mask.t()
    one_head = [size for size in lead if size != 1] == [size for size in mask.shape if size != 1]
    flat = lead.numel() == mask.numel() and (len(lead) == 1 or one_head or not beside)
    return mask.reshape(lead) if flat else None


def _stands_apart(name: str, lead: Sequence[int], mask: Tensor) -> bool:
    """Whether what a layer reads is no part of a batch's tokens, or of those that count alone.

    Experts see the tokens that are routed to them. One vector for each row, or the same for all rows, is no padding; as
    many as tokens that count are what a model made of them that leaves out padding itself.
    """
    per_row = len(lead) == 1 and lead[0] == len(mask)
    for_all_rows = len(lead) > 1 and lead[0] == 1 < len(mask)
    unpadded = len(lead) == 1 and lead[0] == int(mask.sum())
    return per_row or for_all_rows or unpadded or EXPERTS.search(name) is not None


def _tower(name: str) -> str:
    """The outermost list of blocks that a layer is in: an encoder of pictures has another one than a decoder."""
    return re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]
