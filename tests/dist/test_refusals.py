"""Storage and shortages that a pass refuses by name, alike on every rank and before anything is changed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.config import DecompositionConfig
from dsee_scale.partition import open_partition
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
            dsee_scale.prune(model, PruneConfig(sparsity=0.5))
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


def short_of_memory(rank: int, mib: int) -> str:
    """A rank that cannot get `mib` MiB more, while matrices of 16 MiB go round."""
    shape = dict(
        hidden_size=2048, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, head_dim=256
    )
    model = partition(build(llama_config(**shape)), zero3_config())
    config = DSEEConfig(rank=3, num_sparse=7, decomposition=DecompositionConfig(round_memory_mib=16))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if torch.distributed.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20), limits[1]))
    try:
        dsee_scale.inject(model, config)
    except dsee_scale.PartitionError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return "no error"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_memory_for_a_round_names_the_setting_on_every_rank(pools, rank):
    texts = pools(2).run(short_of_memory, rank, 8)
    assert len(set(texts)) == 1
    assert "lower decomposition.round_memory_mib (now 16)" in texts[0]
