"""Storage and shortages that a pass refuses by name, alike on every rank and before anything is changed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.config import DecompositionConfig
from dsee_scale.partition import open_partition, zero3
from tests.models import build, llama_config, partition, zero3_config


def refused_storage(attribute: str, call: str) -> str:
    """What DeepSpeed marks a shard with that it keeps on NVMe, or that it has quantised."""
    model = partition(build(llama_config()), zero3_config())
    marked = model.model.layers[1].self_attn.v_proj.weight
    if call == "prune":
        dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    setattr(marked.ds_tensor, attribute, "nvme" if attribute == "final_location" else torch.ones(1))
    before = [open_partition(model).shard(p).data.clone() for p in model.parameters()]
    with pytest.raises(dsee_scale.PartitionError) as caught:
        if call == "inject":
            dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
        else:
            dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    after = [open_partition(model).shard(p).data for p in model.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return str(caught.value)


@pytest.mark.parametrize("call", ["inject", "prune"])
@pytest.mark.parametrize(
    ("attribute", "named"),
    [("final_location", "NVMe.*offload_param"), ("ds_quant_scale", "zero_quantized_nontrainable_weights")],
)
def test_storage_that_cannot_be_edited_is_refused_by_name(pools, attribute, named, call):
    texts = pools(2).run(refused_storage, attribute, call)
    assert len(set(texts)) == 1
    assert texts[0].startswith("model.layers.1.self_attn.v_proj.weight is ")
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(texts[0])


def wide_model() -> torch.nn.Module:
    """Targets of 16 MiB, partitioned."""
    shape = dict(
        hidden_size=2048, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, head_dim=256
    )
    return partition(build(llama_config(**shape)), zero3_config())


def injected(model: torch.nn.Module, round_memory_mib: int) -> str:
    config = DSEEConfig(
        rank=3, num_sparse=7, decomposition=DecompositionConfig(round_memory_mib=round_memory_mib)
    )
    try:
        dsee_scale.inject(model, config)
    except dsee_scale.PartitionError as error:
        return str(error)
    return "no error"


def short_of_memory(rank: int) -> str:
    """A rank without memory for a round's transfer: 64 MiB, more than a heap serves from what it has kept."""
    model = wide_model()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if torch.distributed.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_AS, (held + (16 << 20), limits[1]))
    try:
        return injected(model, round_memory_mib=64)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_memory_for_a_round_names_the_setting_on_every_rank(pools, rank):
    texts = pools(2).run(short_of_memory, rank)
    assert len(set(texts)) == 1
    assert "lower decomposition.round_memory_mib (now 64)" in texts[0]


def short_in_the_first_of_two_rounds(rank: int) -> tuple[str, int]:
    """A rank whose memory ends while it puts its first matrix together: the others are a round ahead."""
    rounds = 0
    together = zero3.AllToAll.wait

    def wait(exchange: zero3.AllToAll) -> dict[int, torch.Tensor]:
        nonlocal rounds
        rounds += 1
        whole = together(exchange)
        if rounds == 1 and torch.distributed.get_rank() == rank:
            raise MemoryError("no room for the first round's matrix")
        return whole

    model = wide_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3.AllToAll, "wait", wait)
        return injected(model, round_memory_mib=16), rounds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_runs_out_of_memory_within_a_round_is_followed_to_the_end(pools, rank):
    (text, rounds), (other, _) = pools(2).run(short_in_the_first_of_two_rounds, rank)
    assert rounds > 1
    assert text == other
    assert "lower decomposition.round_memory_mib (now 16)" in text
