"""Masks change only in a pruning, so most checkpoints take the mask files of the one before, under second names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dsee_scale.adapters.state import MaskFiles, model_state
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder
from dsee_scale.checkpoint.masks import STEM
from dsee_scale.partition.port import Partition

SAMPLED = 1024
"""Entries of a shard that are looked at, to notice weights that were changed from outside."""


def link_masks(partition: Partition, new: NewFolder, module: nn.Module) -> dict[str, int] | None:
    """Collective. Take a model's masks from the files that have them, each rank a share.

    Returns:
        Number of entries that each pruned weight keeps; None, and nothing was done, where some rank can't do it.
    """
    saved = known_files(partition, module)
    mine: list[str] = []
    failed = saved is None
    if saved is not None:
        mine = list(saved.files)[partition.rank :: partition.world_size]
        try:
            for name in mine:
                new.link(name, saved.folder / name, saved.files[name])
        except OSError:  # e.g. that checkpoint was deleted
            failed = True
    if int(partition.sum_over_ranks(torch.tensor([failed]).int())):
        for name in mine:
            new.unlink(name)
        return None
    assert saved is not None
    return dict(saved.kept)


def has_masks(partition: Partition, module: nn.Module, stored: StoredFolder) -> bool:
    """Collective. Whether a model has the masks of a saved folder already, so that they need not be applied."""
    known = known_files(partition, module)
    here = known is not None and known.files == {name: stored.files[name] for name in stored.names(STEM)}
    return not int(partition.sum_over_ranks(torch.tensor([not here]).int()))


def masks_now(partition: Partition, module: nn.Module, kept: Mapping[str, int]) -> MaskFiles | None:
    """Local. A model's masks as they are, for `note_files` once they are saved.

    None where there are none, and for quantised weights, which would be decoded each time to see if they are the same.
    """
    weights = _pruned(module)
    if not weights or any(id(param) in partition.codecs for param in weights.values()):
        return None
    return MaskFiles(Path(), {}, dict(kept), model_state(module).prunings, _sample(partition, weights))


def note_files(module: nn.Module, masks: MaskFiles | None, stored: StoredFolder) -> None:
    """Local. Remember that a saved folder holds these masks."""
    files = {name: stored.files[name] for name in stored.names(STEM)}
    model_state(module).masks = (
        None if masks is None else dataclasses.replace(masks, folder=stored.path.resolve(), files=files)
    )


def known_files(partition: Partition, module: nn.Module) -> MaskFiles | None:
    """Local. The files that hold a model's masks as they are, as far as is known."""
    saved, weights = model_state(module).masks, _pruned(module)
    if saved is None or saved.prunings != model_state(module).prunings or saved.kept.keys() != weights.keys():
        return None
    if any(param.requires_grad for param in weights.values()) or saved.sample != _sample(partition, weights):
        return None
    return saved


def _pruned(module: nn.Module) -> dict[str, nn.Parameter]:
    params = dict(module.named_parameters())
    return {name: params[name] for name in model_state(module).pruned if name in params}


def _sample(partition: Partition, weights: Mapping[str, nn.Parameter]) -> list[int]:
    """Local. A number for each weight that tells where some zeros of its shard are.

    A pruning says that masks have changed; this notices weights that someone else has loaded or written since.
    """
    numbers = []
    for param in weights.values():
        data = partition.shard(param).data
        bits = data[data.numel() // 2 :][:SAMPLED] != 0
        numbers.append((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())
    return torch.stack(numbers).tolist() if numbers else []
