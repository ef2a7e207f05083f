"""The ZeRO-3 port reads and writes the same weights as the dense one."""

from __future__ import annotations

import pytest
import torch

from dsee_scale.partition import open_partition
from tests.models import build, llama_config, partition, zero3_config


def read_everything(dtype: torch.dtype, zero: dict) -> None:
    whole = dict(build(llama_config(), dtype).named_parameters())
    model = partition(build(llama_config(), dtype), zero3_config(dtype, **zero))
    port = open_partition(model)
    named = dict(model.named_parameters())
    params = list(named.values())
    assert all(p.numel() == 0 or p.ds_persist for p in params)
    for name, param in named.items():
        shard = port.shard(param)
        expected = whole[name].flatten()[shard.start : shard.start + shard.data.numel()]
        assert torch.equal(shard.data, expected), name
    lengths = port.sum_over_shards(torch.tensor([port.shard(p).data.numel() for p in params]))
    assert lengths.tolist() == [whole[name].numel() for name in named]
    for name, value in zip(named, port.gather(params), strict=True):
        assert torch.equal(value, whole[name]), name
    for name, value in zip(named, port.gather_each(params, dst=port.world_size - 1), strict=True):
        assert (value is not None) == (port.rank == port.world_size - 1)
        assert value is None or torch.equal(value, whole[name]), name
    owners = [i % port.world_size for i in range(len(params))]
    workspace = torch.empty(port.exchange_bytes(params, owners), dtype=torch.uint8)
    mine = port.start_exchange(params, owners, workspace).wait()
    assert sorted(mine) == [i for i, o in enumerate(owners) if o == port.rank]
    for i, value in mine.items():
        assert torch.equal(value, whole[list(named)[i]])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "zero", [{}, {"stage3_param_persistence_threshold": 1000}, {"offload_param": {"device": "cpu"}}]
)
def test_every_read_equals_the_whole_weight(pools, world_size, dtype, zero):
    pools(world_size).run(read_everything, dtype, zero)


def fail_on_one_rank() -> str:
    model = partition(build(llama_config()), zero3_config())
    port = open_partition(model)
    port.raise_together(None)
    try:
        port.raise_together(ValueError("weight 7 is bad") if port.rank == port.world_size - 1 else None)
    except Exception as error:
        return str(error)
    return ""


def test_an_error_of_one_rank_is_raised_on_all(pools):
    assert all("weight 7 is bad" in text for text in pools(3).run(fail_on_one_rank))
