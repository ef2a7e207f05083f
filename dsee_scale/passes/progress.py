"""When long work shows a progress bar."""

from __future__ import annotations

import sys

from dsee_scale.partition import Partition


def show_progress(partition: Partition, wanted: bool | None) -> bool:
    """On rank 0, if asked for or (wanted=None) if a person watches."""
    return partition.rank == 0 and (sys.stderr.isatty() if wanted is None else wanted)
