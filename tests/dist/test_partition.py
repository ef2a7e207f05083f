"""The ZeRO-3 port reads and writes the same weights as the dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dsee_scale
from dsee_scale import DSEEConfig
from dsee_scale.partition import open_partition
from tests.dist.test_inject_prune import ENGINES, engine_for, train, zero3_engine_config
from tests.models import build, llama_config, partition, token_batch, zero3_config


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
    for found in (mine, port.collect(params, owners)):
        for i, value in found.items():
            assert torch.equal(value, whole[list(named)[i]])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "zero", [{}, {"stage3_param_persistence_threshold": 1000}, {"offload_param": {"device": "cpu"}}]
)
def test_every_read_equals_the_whole_weight(pools, world_size, dtype, zero):
    pools(world_size).run(read_everything, dtype, zero)


def write_from_owners(dtype: torch.dtype, zero: dict | None) -> float:
    """New values of frozen weights, brought by their owners; the loss of the engine that has them."""
    model = injected(dtype, zero3_engine_config(dtype, zero) if zero is not None else None)
    engine = engine_for(model, zero3_engine_config(dtype, zero)) if zero is not None else model
    if zero is not None:
        train(engine, 1)  # leaves what DeepSpeed derives from shards in the state that a retune finds
    port = open_partition(engine)
    named = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    params, sizes = list(named.values()), [port.shape(p).numel() for p in named.values()]
    values = [new_values(name, port.shape(param)) for name, param in named.items()]
    owners = [(i + i // 5) % port.world_size for i in range(len(params))]
    if zero is not None:
        for param in params:
            param.ds_tensor[port.shard(param).data.numel() :] = 7
    with watched() as sent:
        mine = {i: values[i] for i, owner in enumerate(owners) if owner == port.rank}
        port.scatter(params, owners, mine)
    if zero is not None:
        assert sent == ["all_reduce"] * (port.world_size > 1) + ["all_to_all_single"], sent
        assert all((p.ds_tensor[port.shard(p).data.numel() :] == 7).all() for p in params)
        lengths = port.sum_over_shards(torch.tensor([port.shard(p).data.numel() for p in params]))
        assert lengths.tolist() == sizes
    for name, value, new in zip(named, port.gather(params), values, strict=True):
        assert torch.equal(value, new.to(dtype)), name
    ids = token_batch()
    return engine(ids, labels=ids).loss.item()


def injected(dtype: torch.dtype, ds_config: dict | None) -> torch.nn.Module:
    model = build(llama_config(), dtype)
    model.few = torch.nn.Parameter(torch.zeros(4, dtype=dtype))  # leaves the third rank an empty shard
    if ds_config is not None:
        partition(model, ds_config)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    return model


def new_values(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 0.1


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Names of torch.distributed's transfers that are called."""
    names = [
        n for n in dir(dist) if n.startswith(("all_", "broadcast", "gather", "scatter", "reduce", "send"))
    ]
    called: list[str] = []

    def noting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if callable(getattr(dist, name)):
                patch.setattr(dist, name, noting(name))
        yield called


@pytest.mark.parametrize(
    "world_size, dtype", [(1, torch.bfloat16), (2, torch.float32), (2, torch.bfloat16), (3, torch.float32)]
)
def test_owners_write_whole_values_into_every_shard(pools, world_size, dtype):
    kinds = {"replicas": None, **ENGINES}
    losses = {}
    for kind, zero in kinds.items():
        if zero is None or world_size % zero.get("zero_hpz_partition_size", 1) == 0:
            losses[kind] = pools(world_size).run(write_from_owners, dtype, zero)
    assert len(losses) == len(kinds) - (0 if world_size == 2 else 2)
    for kind, found in losses.items():
        assert len(set(found)) == 1
        exact = dtype == torch.float32 and kind != "replicas"  # these have not made a step before
        assert found == pytest.approx(losses["zero3"], rel=1e-5 if exact else 2e-2), kind


def fail_on_one_rank() -> tuple[str, str]:
    model = partition(build(llama_config()), zero3_config())
    port = open_partition(model)
    port.raise_first(None)
    try:
        port.raise_first(ValueError("weight 7 is bad") if port.rank == port.world_size - 1 else None)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_one_rank_is_raised_on_all(pools):
    found = pools(3).run(fail_on_one_rank)
    assert found == [("PartitionError", "rank 2: ValueError: weight 7 is bad")] * 3
