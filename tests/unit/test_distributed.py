"""Which GPU a process communicates from, told before anything was put on one."""

from __future__ import annotations

import pytest
import torch

from dsee_scale.distributed import own_gpu
from dsee_scale.errors import PartitionError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "current", "count", "local_rank", "expected"),
    [
        (torch.device("cuda", 3), 0, 8, None, 3),
        (torch.device("cuda"), 2, 8, 5, 2),
        (CPU, 5, 8, None, 5),
        (CPU, 0, 8, 6, 6),
        (CPU, 0, 8, 0, 0),
        (CPU, 0, 1, 6, 0),
    ],
)
def test_the_gpu_is_told_without_set_device(device, current, count, local_rank, expected):
    found = own_gpu(device, current=current, count=count, local_rank=local_rank)
    assert found == torch.device("cuda", expected)


@pytest.mark.parametrize("local_rank", [None, 9])
def test_a_gpu_that_could_be_any_is_refused(local_rank):
    with pytest.raises(PartitionError, match=r"torch\.cuda\.set_device"):
        own_gpu(CPU, current=0, count=8, local_rank=local_rank)
