"""What injection, pruning and export hold and send: a whole weight on the rank alone that needs it, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.algorithms.loops import BINS
from dsee_scale.checkpoint import tensors
from dsee_scale.config import DecompositionConfig
from dsee_scale.partition import open_partition
from dsee_scale.training.journal import peak_memory, reset_peak_memory
from tests.dist.test_inject_prune import ENGINES, engine_for, make, train, zero3_engine_config
from tests.models import build, llama_config, partition, zero3_config
from tests.watch import Watch

MATRIX = 512 * 512 * 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = 12
NUM_SPARSE = 50
LARGE = 4096
BATCH = 1 << 11


def memory_of_injection() -> tuple[int, list[tuple[str, int]]]:
    sizes = dict(hidden_size=512, intermediate_size=64, num_attention_heads=8, num_key_value_heads=8)
    model = build(llama_config(**sizes, head_dim=64, num_hidden_layers=LAYERS))
    partition(model, zero3_config())
    config = DSEEConfig(
        rank=3,
        num_sparse=NUM_SPARSE,
        target_modules=TARGETS,
        decomposition=DecompositionConfig(rank=8, round_memory_mib=1),
    )
    with Watch() as watch:
        dsee_scale.inject(model, config)
    return watch.peak, watch.sent


@pytest.mark.parametrize("world_size", [2, 3])
def test_injection_holds_its_shard_and_the_matrices_it_owns_at_the_moment(pools, world_size):
    """Of 48 matrices, two rounds of one for each rank are on their way, and one is decomposed."""
    for peak, sent in pools(world_size).run(memory_of_injection):
        on_the_way = 2 * (
            MATRIX + MATRIX
        )  # in each round a rank sends shards of all its matrices, and gets one
        decomposed = 8 * MATRIX
        adapters = LAYERS * len(TARGETS) * (6 * 512 + NUM_SPARSE) * 8
        assert MATRIX < peak < on_the_way + decomposed + adapters < LAYERS * len(TARGETS) * MATRIX / 2
        matrices = [size for name, size in sent if name == "alltoall_base"]
        assert len(matrices) == LAYERS * len(TARGETS) // world_size
        assert all(size <= 2 * MATRIX + 8 * world_size for size in matrices)
        supports = 8 * NUM_SPARSE * len(matrices)  # in one message from each rank
        assert all(size <= supports < MATRIX for name, size in sent if name != "alltoall_base")


PRUNINGS = {
    "unstructured": PruneConfig(sparsity=0.5, score="WABS"),
    "2:4": PruneConfig(pattern="2:4", score="WABS", modules=("q_proj", "k_proj", "v_proj")),
    "neurons": PruneConfig(pattern="neurons", sparsity=0.3, score="WABS"),
}


def traffic_of_pruning(config: PruneConfig, kind: str) -> tuple[list[tuple[str, int]], int]:
    ds_config = zero3_engine_config(torch.float32, ENGINES[kind])
    engine = engine_for(make("llama", torch.float32, ds_config), ds_config)
    train(engine, 1)
    with Watch(memory=False) as watch:
        dsee_scale.prune(engine, config)
    port = open_partition(engine)
    layers = adapted_layers(engine.module).values()
    return watch.sent, sum(4 * (port.shape(layer.dsee_flat).numel() + 2) for layer in layers)


@pytest.mark.parametrize("kind", ["zero3", "hierarchical, resident", "offload"])
@pytest.mark.parametrize("pruning", list(PRUNINGS))
def test_pruning_a_live_engine_sends_adapters_and_counts_but_no_weight(pools, pruning, kind):
    for sent, adapters in pools(2).run(traffic_of_pruning, PRUNINGS[pruning], kind):
        whole = [size for name, size in sent if name == "allgather_base"]
        assert len(whole) == 1 and whole[0] <= 1.5 * adapters  # each rank's piece, and all of them
        others = [(name, size) for name, size in sent if name != "allgather_base"]
        assert {name for name, _ in others} == {"allreduce"}
        assert max(size for _, size in others) <= 8 * BINS


def weights_fetched_by_a_refit(
    kind: str, num_batches: int, gram_memory_mib: int, short_on: int | None = None
) -> float:
    """How often all block weights came, whole; one rank may lack the memory to keep a block."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
    ds_config = zero3_engine_config(torch.float32, ENGINES[kind])
    model = partition(build(llama_config(**sizes, head_dim=64, num_hidden_layers=2)), ds_config)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=NUM_SPARSE, target_modules=TARGETS))
    engine = engine_for(model, ds_config)
    train(engine, 1)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 64, (2, 16), generator=generator)} for _ in range(num_batches)]
    config = PruneConfig(sparsity=0.5, block_steps=2 * num_batches, gram_memory_mib=gram_memory_mib)
    make_empty, block = torch.empty, 4 * sum(p.ds_numel for p in engine.module.model.layers[0].parameters())

    def empty(*sizes: Any, **settings: Any) -> torch.Tensor:
        if sizes == (block,):
            raise MemoryError("no room")
        return make_empty(*sizes, **settings)

    with pytest.MonkeyPatch.context() as patch, Watch(memory=False) as watch:
        if dist.get_rank() == short_on:
            patch.setattr(torch, "empty", empty)
        dsee_scale.prune(engine, config, batches)
    weights = list(engine.module.model.layers.parameters())
    assert not any(p.ds_active_sub_modules or p.ds_status.name == "AVAILABLE" for p in weights)
    return sum(size for name, size in watch.sent if "allgather" in name) / sum(
        4 * p.ds_numel for p in weights
    )


@pytest.mark.parametrize("kind", ["zero3", "hierarchical, resident", "offload"])
def test_a_refit_fetches_a_block_once_for_all_batches_of_a_pass(pools, kind):
    """Another batch is one more pass through the whole model, which catches what the blocks are called with."""

    def fetched(num_batches: int, *how: int) -> float:
        return max(pools(2).run(weights_fetched_by_a_refit, kind, num_batches, *how))

    whole_model = 1.5  # what a rank sends counts beside what comes
    more = (fetched(4, 64) - fetched(2, 64)) / 2
    assert more < 1.1 * whole_model
    assert more >= whole_model or "resident" in kind
    assert (fetched(4, 1) - fetched(2, 1)) / 2 > 5 * more  # no room to keep a block
    assert (fetched(4, 64, 1) - fetched(2, 64, 1)) / 2 > 5 * more  # none on one of the ranks


def traffic_of_saving(folder: Path, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Bytes of every gather of `save_adapter`, and of every layer's trained values."""
    ds_config = zero3_engine_config(dtype, {})
    model = partition(build(llama_config(num_hidden_layers=LAYERS), dtype), ds_config)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=4, target_modules=TARGETS))
    engine = engine_for(model, ds_config)
    with pytest.MonkeyPatch.context() as patch, Watch(memory=False) as watch:
        patch.setattr(tensors, "BATCH_BYTES", BATCH)
        dsee_scale.save_adapter(engine, folder)
    port = open_partition(engine)
    values = [layer.dsee_flat for layer in adapted_layers(model).values()]
    sizes = [dtype.itemsize * port.shape(param).numel() for param in values]
    return [size for name, size in watch.sent if name == "allgather_base"], sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_gathered_one_batch_of_its_file_at_a_time(pools, tmp_path, dtype):
    for sent, sizes in pools(2).run(traffic_of_saving, tmp_path / "adapter", dtype):
        # What a rank sends counts beside what comes; a batch begins and ends within a layer.
        assert max(sent) <= 1.5 * (BATCH + 2 * max(sizes)) < 1.5 * sum(sizes) / 3
        assert sum(sent) < 1.5 * (sum(sizes) + len(sent) * 2 * max(sizes))


def memory_of_export(folder: str) -> int:
    """Bytes at the highest point beyond what there was, in resident memory, which sees gloo's buffers too."""
    weights = [torch.nn.Linear(LARGE, LARGE, bias=False) for _ in range(3)]
    model = partition(torch.nn.Sequential(*weights), zero3_config())
    before = psutil.Process().memory_info().rss
    reset_peak_memory()
    dsee_scale.export_model(model, folder)
    return peak_memory()[open_partition(model).rank] - before


@pytest.mark.skipif(torch.cuda.is_available(), reason="peak_memory would count the GPU's")
def test_export_holds_one_whole_weight_on_the_rank_that_writes(pools, tmp_path):
    writes, sends = pools(2).run(memory_of_export, str(tmp_path / "exported"))
    weight = LARGE * LARGE * 4
    assert 0.8 * weight < writes < 1.4 * weight  # pages that were there already may be used again
    assert sends < 0.4 * weight
