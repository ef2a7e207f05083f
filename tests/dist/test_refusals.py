"""Storage and shortages that a pass refuses by name, alike on every rank and before anything is changed."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig
from dsee_scale.adapters.state import model_state
from dsee_scale.config import DecompositionConfig
from dsee_scale.partition import exchange, open_partition, unwrap, zero3
from dsee_scale.passes import blocks
from dsee_scale.passes.inputs import watch
from dsee_scale.pruning import lowest, sensitivity_shares
from dsee_scale.pruning.refit import block as refit_block
from tests.dist.test_inject_prune import engine_for, whole_weights
from tests.models import build, llama_config, partition, token_batch, zero3_config
from tests.unit.test_calibrate import make


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


def unknown_engines() -> list[str]:
    """What inject and prune say to models that are split otherwise; no rank may wait for another one."""
    texts = []
    for made in (
        fully_sharded,
        fully_sharded_by_units,
        fully_sharded_inside,
        tensor_parallel,
        pipelined,
        experts_of_deepspeed,
        spread_by_auto_ep,
    ):
        model = made()
        for call in (
            lambda: dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=("0",))),  # noqa: B023
            lambda: dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=("0",), score="W")),  # noqa: B023
        ):
            with pytest.raises(dsee_scale.PartitionError) as caught:
                call()
            texts.append(str(caught.value))
    return texts


def fully_sharded() -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return fully_shard(torch.nn.Sequential(torch.nn.Linear(8, 8)), mesh=mesh)


def fully_sharded_by_units() -> torch.nn.Module:
    """FSDP's first version, whose parameters are views into flat ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 8)), device_id=torch.device("cpu"))


def fully_sharded_inside() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), fully_sharded_by_units())


def tensor_parallel() -> torch.nn.Module:
    from deepspeed.module_inject.layers import LinearLayer

    return torch.nn.Sequential(torch.nn.Linear(8, 8), LinearLayer(torch.nn.Linear(8, 8), mp_group=None))


def pipelined() -> torch.nn.Module:
    from deepspeed.pipe import PipelineModule

    layers = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    return PipelineModule(layers, num_stages=torch.distributed.get_world_size(), partition_method="uniform")


def experts_of_deepspeed() -> torch.nn.Module:
    from deepspeed.moe.layer import MoE

    expert = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return torch.nn.Sequential(torch.nn.Linear(8, 8), MoE(hidden_size=8, expert=expert, num_experts=2))


def spread_by_auto_ep() -> torch.nn.Module:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    layer = AutoEPMoELayer.__new__(AutoEPMoELayer)  # what it is told by; made by an engine alone
    torch.nn.Module.__init__(layer)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), layer)


def test_models_that_are_split_otherwise_are_refused_by_name(pools):
    texts = pools(2).run(unknown_engines)
    assert texts[0] == texts[1]
    for index, name in enumerate(
        ("FSDP", "FSDP", "FSDP", "AutoTP", "pipeline", "mixture-of-experts", "AutoEP")
    ):
        for text in texts[0][2 * index : 2 * index + 2]:
            assert name in text and "DDP or ZeRO-1, 2 or 3" in text


def trained_behind_an_engine(stage: int) -> str:
    """The raw module of an engine that trains all of it, which prune cannot tell from any other."""
    import deepspeed

    config = zero3_config()
    config["zero_optimization"]["stage"] = stage
    model = build(llama_config())
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    with pytest.raises(dsee_scale.TargetError) as caught:
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_an_engine_trains_are_refused_on_its_raw_module(pools, stage):
    assert all("is being trained" in text for text in pools(2).run(trained_behind_an_engine, stage))


def trained_under_fsdp(output: str) -> tuple[str, int]:
    """What a stock Trainer says to a model that FSDP2 splits, and the step that it says it at."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Ready(Trainer):
        def _wrap_model(self, model, *args, **kwargs):
            """The model is split already."""
            return model

    model = build(llama_config(tie_word_embeddings=False))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3))
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    rows = [{"input_ids": row, "labels": row} for row in token_batch(batch=8)]
    args = TrainingArguments(output, max_steps=3, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Ready(model, args, train_dataset=rows, callbacks=[DSEECallback(PruneConfig(score="W"), 2)])
    with pytest.raises(dsee_scale.PartitionError) as caught:
        trainer.train()
    return str(caught.value), trainer.state.global_step


def test_a_trainer_refuses_fsdp_before_its_first_step(pools, tmp_path):
    (text, step), other = pools(2).run(trained_under_fsdp, str(tmp_path))
    assert (text, step) == other
    assert "FSDP" in text and "ZeRO-3" in text
    assert step == 0


def split_by_groups() -> list[str]:
    """What is said of ranks that hold other weights, or copies on some ranks alone."""
    import torch.distributed as dist

    model = partition(build(llama_config()), zero3_config())
    next(model.parameters()).comm = object()  # as `MiCS_Init` sets on each
    engine = torch.nn.Linear(8, 8)
    engine.mp_world_size = 2  # a DeepSpeed engine's, with an `mpu`
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    copied = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(8, 8), process_group=alone[dist.get_rank()]
    )
    texts = []
    for each in (model, engine, copied):
        with pytest.raises(dsee_scale.PartitionError) as caught:
            open_partition(each)
        texts.append(str(caught.value))
    return texts


def test_groups_of_ranks_are_refused_by_name(pools):
    texts = pools(2).run(split_by_groups)
    assert texts[0] == texts[1]
    for text, words in zip(texts[0], ("MiCS", "over 2 processes", "over 1 of 2 processes"), strict=True):
        assert words in text


def calibrated_on_one_rank(refit: bool) -> str:
    """What is said where rank 0 alone has calibration batches."""
    import torch.distributed as dist

    model = partition(build(llama_config()), zero3_config())
    batches = [{"input_ids": token_batch()}] if dist.get_rank() == 0 else None
    before = [open_partition(model).shard(p).data.clone() for p in model.parameters()]
    with pytest.raises(dsee_scale.CalibrationError) as caught:
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, refit=refit), batches)
    after = [open_partition(model).shard(p).data for p in model.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return str(caught.value)


@pytest.mark.parametrize("refit", [False, True])
def test_calibration_on_some_ranks_alone_is_refused_on_all(pools, refit):
    texts = pools(2).run(calibrated_on_one_rank, refit)
    assert texts[0] == texts[1] and "1 with nothing, 1 with batches" in texts[0]


def injected_model(sharded: bool, **zero: Any) -> torch.nn.Module:
    """An engine under ZeRO-3, or DDP."""
    if sharded:
        return engine_for(make("llama"), zero3_config(**zero))
    return torch.nn.parallel.DistributedDataParallel(make("llama"))


def what_prune_says(model: torch.nn.Module, calibration: object, refit: bool = False) -> tuple[str, bool]:
    """The error, and whether the model may be used on."""
    with pytest.raises(dsee_scale.DSEEError) as caught:
        dsee_scale.prune(model, PruneConfig(refit=refit), calibration)
    return f"{type(caught.value).__name__}: {caught.value}", model_state(unwrap(model)).broken is None


def short_while_it_writes(where: str, sharded: bool) -> tuple[str, bool]:
    model, write, calls = injected_model(sharded), getattr(lowest, where), 0

    def short(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3 and torch.distributed.get_rank() == 1:
            raise MemoryError("no room")
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowest, where, short)
        return what_prune_says(model, [token_batch()])


@pytest.mark.parametrize(
    ("where", "sharded"), [("_zero_groups", True), ("_zero_groups", False), ("_inside", True)]
)
def test_a_rank_whose_memory_ends_while_it_writes_ends_the_pruning_on_all(pools, where, sharded):
    found = pools(2).run(short_while_it_writes, where, sharded)
    assert len(set(found)) == 1
    assert found[0][0].startswith(
        "PartitionError: pruning stopped half way: model.layers.0.self_attn.q_proj.weight"
    )
    assert found[0][0].count("MemoryError: no room") == 1 and not found[0][1]


SHORT = {
    "kept": (blocks._Capture, "_kept", "lower the number of calibration batches"),
    "alike": (blocks, "_same", "lower the number of calibration batches"),
    "tokens": (sensitivity_shares, "_token_weights", "rank 1: MemoryError: no room"),
    "histogram": (sensitivity_shares, "count_keys_", "rank 1: MemoryError: no room"),
    "squares": (watch, "sum_of_squares", "lower the number of tokens in a calibration batch"),
    "padding": (watch.Kept, "of", "lower the number of tokens in a calibration batch"),
    "whole": (exchange.Piece, "whole", "lower gram_memory_mib (now 4096)"),
    "cut": (exchange.Piece, "cut", "pruning stopped half way: "),
}
"""Where memory ends in a re-fit, and what is said then."""


def short_in_a_refit(where: str, zero: dict[str, int]) -> tuple[str, bool, bool]:
    model = injected_model(sharded=True, **zero)
    before = whole_weights(model)

    def short(*_: object) -> None:
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(*SHORT[where][:2], short)
        said = what_prune_says(model, [token_batch(), token_batch(seed=1)], refit=True)
    after = whole_weights(model)
    return *said, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("zero", [{}, {"zero_hpz_partition_size": 2}], ids=["zero3", "hierarchical"])
@pytest.mark.parametrize("where", list(SHORT))
def test_a_rank_whose_memory_ends_between_two_messages_of_a_refit_leaves_no_other_waiting(pools, where, zero):
    found = pools(2).run(short_in_a_refit, where, zero)
    text, usable, unchanged = found[0]
    assert found[0] == found[1] and unchanged
    assert text.startswith("PartitionError: ") and text.count("no room") == 1 and SHORT[where][2] in text
    assert usable == (where != "cut")  # by then the block counts as written


def short_in_the_gram_pass() -> tuple[str, bool]:
    """Rank 1 has no room for what it hands out once a block runs for its Gram matrices."""
    model, of, run_block, running = injected_model(sharded=True), watch.Kept.of, refit_block.run_block, []

    def short(*args: Any) -> torch.Tensor | None:
        if running and torch.distributed.get_rank() == 1:
            raise MemoryError("no room")
        return of(*args)

    def run(*args: Any) -> torch.Tensor:
        running.append(args)
        return run_block(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Kept, "of", short)
        patch.setattr(refit_block, "run_block", run)
        return what_prune_says(model, [token_batch()], refit=True)


def test_a_rank_whose_memory_ends_in_a_gram_pass_leaves_no_other_waiting(pools):
    found = pools(2).run(short_in_the_gram_pass)
    assert found[0] == found[1] and found[0][1]
    assert "lower the number of tokens in a calibration batch: no room" in found[0][0]


def short_in_a_calibration() -> str:
    model = injected_model(sharded=True)

    def short(*_: object) -> None:
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(watch, "sum_of_squares", short)
        with pytest.raises(dsee_scale.PartitionError) as caught:
            dsee_scale.calibrate(model, [token_batch()])
    return str(caught.value)


def test_a_rank_whose_memory_ends_while_it_calibrates_leaves_no_other_waiting(pools):
    texts = pools(2).run(short_in_a_calibration)
    assert texts[0] == texts[1] and "lower the number of tokens in a calibration batch: no room" in texts[0]


def statistics_of_ones_own(sharded: bool, other_model: bool) -> tuple[str, bool]:
    model = injected_model(sharded)
    statistics = dsee_scale.calibrate(model, [token_batch()])
    if torch.distributed.get_rank() == 1:
        other = "0" * 64 if other_model else statistics.fingerprint
        squares = {name: value + 1 for name, value in statistics.squares.items()}
        statistics = dataclasses.replace(statistics, squares=squares, fingerprint=other)
    return what_prune_says(model, statistics)


@pytest.mark.parametrize("other_model", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_statistics_that_differ_between_ranks_are_refused_on_all(pools, sharded, other_model):
    found = pools(2).run(statistics_of_ones_own, sharded, other_model)
    assert len(set(found)) == 1 and found[0][1]
    assert "differs between the ranks: rank 1's statistics are not rank 0's" in found[0][0]


def statistics_of_another_model(sharded: bool) -> tuple[str, bool]:
    model = injected_model(sharded)
    statistics = dsee_scale.calibrate(model, [token_batch()])
    embedding = unwrap(model).get_input_embeddings().weight
    with torch.no_grad(), open_partition(model).edit(embedding) as stretches:
        for stretch in stretches:
            stretch.data.mul_(2)
    return what_prune_says(model, statistics)


@pytest.mark.parametrize("sharded", [True, False])
def test_statistics_of_a_model_with_another_embedding_are_refused(pools, sharded):
    found = pools(2).run(statistics_of_another_model, sharded)
    assert len(set(found)) == 1 and found[0][1]
    assert "belong to another model" in found[0][0]
