"""Work of one rank's own in a re-fit, whose errors are every rank's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
