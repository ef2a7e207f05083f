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
def block_pass(
    partition: Partition, config: PruneConfig, setting: str | None = None
) -> Iterator[list[Exception]]:
    """Collective at its end. A block's forward passes over a rank's batches, whose errors are every rank's.

    Under ZeRO-3 one that leaves its pass leaves the others in it: there only errors that are put into the list that
    this yields are, and the passes go on.
    """
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:
        if not partition.replicated:
            raise
        failed.append(error)
    with refitting_work(partition, config, setting):
        if failed:
            raise failed[0]


@contextlib.contextmanager
def held(
    block: nn.Module, uses: int, config: PruneConfig, partition: Partition, beside: int = 0
) -> Iterator[None]:
    """Collective at its begin. A block that is used several times comes once, where every rank has memory left.

    Args:
        block: its weights stay whole on every rank meanwhile.
        uses: how often it runs; the same on all ranks.
        config: `gram_memory_mib` bounds the weights.
        partition: port to them.
        beside: bytes of that bound that are taken.
    """
    size = partition.held_bytes(block) if uses > 1 else 0
    if not size or beside + size > config.gram_memory_mib << 20 or not _has_room(size, partition):
        yield
        return
    with partition.hold(block):
        yield


def _has_room(size: int, partition: Partition) -> bool:
    """Collective. Whether every rank has so many bytes to spare; if not, fetching for each use will still do."""
    short = 0
    try:
        torch.empty(size, dtype=torch.uint8, device=partition.device)
    except (MemoryError, RuntimeError):  # what PyTorch raises without memory
        short = 1
    return not int(partition.sum_over_ranks(torch.tensor([short])))
