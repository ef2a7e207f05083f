"""Work of one rank's own in a re-fit, whose errors are every rank's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from dsee_scale.config import PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.partition import Partition
from dsee_scale.passes.decompose_model import explain_shortage


@contextlib.contextmanager
def refitting_work(partition: Partition, config: PruneConfig, setting: str | None = None) -> Iterator[None]:
    """Collective at its end: an error of one rank's local work is every rank's; a shortage names what to lower."""
    with raise_on_all_ranks(partition):
        try:
            yield
        except Exception as error:
            setting = setting or f"gram_memory_mib (now {config.gram_memory_mib})"
            raise explain_shortage(error, "while re-fitting a block", setting) from error


@contextlib.contextmanager
def held(block: nn.Module, config: PruneConfig, partition: Partition, beside: int = 0) -> Iterator[None]:
    """Collective at its begin. A block that several batches go through comes once for all, where memory is left.

    Args:
        block: its weights stay whole on every rank meanwhile.
        config: `gram_memory_mib` bounds them.
        partition: port to the weights.
        beside: bytes of that bound that are taken.
    """
    size = partition.held_bytes(block)
    if not size or beside + size > config.gram_memory_mib << 20:
        yield
        return
    with refitting_work(partition, config):  # before any rank waits for one that lacks the memory
        torch.empty(size, dtype=torch.uint8, device=partition.device)
    with partition.hold(block):
        yield
