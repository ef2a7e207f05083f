"""Adapters, exports and training states of partitioned models, written and read by the real engine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import dsee_scale
from dsee_scale import DSEEConfig, FormatError, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint import folder as files
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.export.export import export_model
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.partition.optimizer_state import OptimizerState
from tests.models import build, gpt2_config, llama_config, partition, token_batch, zero3_config

GLOBAL_BATCH = 6
FAMILIES = {
    "llama": (
        llama_config,
        DSEEConfig(
            rank=3, num_sparse=7, support="magnitude", target_modules=("q_proj", "v_proj", "down_proj")
        ),
    ),
    "gpt2": (
        gpt2_config,
        DSEEConfig(
            rank=3,
            num_sparse=7,
            support="magnitude",
            target_modules=("c_attn",),
            output_slices={"c_attn": ("q", "v")},
        ),
    ),
}
ENGINES: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero3 resident": {"stage3_param_persistence_threshold": 1000},
    "zero3 subgroups": {"sub_group_size": 100},
    "zero3 offloaded": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "zero3 hpz": {"zero_hpz_partition_size": 2},
    "zero2": {"stage": 2},
    "zero2 offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero1": {"stage": 1},
    "no zero": {"stage": 0},
}


def ds_config(engine: str, dtype: torch.dtype) -> dict[str, Any]:
    config = zero3_config(dtype, **ENGINES[engine])
    config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // dist.get_world_size()
    if "offload_optimizer" in ENGINES[engine]:
        config["optimizer"]["params"].pop("torch_adam")  # DeepSpeedCPUAdam
    return config


def base_model(family: str, engine: str, dtype: torch.dtype) -> nn.Module:
    model = build(FAMILIES[family][0](), dtype)
    if engine == "zero3 hpz":
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # made once per process, tests need it anew
    return partition(model, ds_config(engine, dtype)) if "zero3" in engine else model


def engine_for(model: nn.Module, engine: str, dtype: torch.dtype) -> Any:
    import deepspeed

    params = dsee_scale.trainable_parameters(model)
    return deepspeed.initialize(model=model, model_parameters=params, config=ds_config(engine, dtype))[0]


def batch(step: int) -> torch.Tensor:
    """This rank's part of the global batch."""
    ids = token_batch(batch=GLOBAL_BATCH, seed=step)
    if not dist.is_initialized():
        return ids
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def train(engine: Any, steps: range) -> list[float]:
    """Global losses of training steps."""
    losses = []
    for step in steps:
        ids = batch(step)
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    module = unwrap(model)
    named = dict(module.named_parameters())
    whole = open_partition(module).gather(list(named.values()))
    return {name: value.clone() for name, value in zip(named, whole, strict=True)}


def begin(folder: str, family: str, engine: str, dtype: torch.dtype) -> tuple[list[float], dict, int]:
    """Inject, train, prune, train, save, and go on undisturbed."""
    model = base_model(family, engine, dtype)
    dsee_scale.inject(model, FAMILIES[family][1])
    running = engine_for(model, engine, dtype)
    train(running, range(2))
    dsee_scale.prune(running, PruneConfig(sparsity=0.5, score="WABS", mask_update=False))
    train(running, range(2, 4))
    save_training_state(running, folder, extra={"phase": "retune"})
    return train(running, range(4, 7)), whole_weights(running), running.global_steps


def resume(folder: str, family: str, engine: str, dtype: torch.dtype) -> tuple[list[float], dict, int]:
    """Go on from the folder in a fresh engine."""
    model = base_model(family, engine, dtype)
    load_adapter(model, folder)
    running = engine_for(model, engine, dtype)
    assert load_training_state(running, folder) == {"phase": "retune"}
    losses = train(running, range(4, 7))
    weights, steps = whole_weights(running), running.global_steps
    load_training_state(running, folder)  # back again, into an engine with other values
    again = train(running, range(4, 7))
    assert again == pytest.approx(losses, abs=1e-6 if "offloaded" in engine else 0)
    return losses, weights, steps


def resume_without_deepspeed(folder: str, family: str) -> tuple[list[float], dict]:
    model = build(FAMILIES[family][0]())
    load_adapter(model, folder)
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1.0)
    load_training_state(model, folder, optimizer=optimizer)
    losses = []
    for step in range(4, 7):
        ids = token_batch(batch=GLOBAL_BATCH, seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, dict(model.named_parameters())


RESUMED = [(engine, torch.float32) for engine in ENGINES]
RESUMED += [
    (engine, torch.bfloat16) for engine in ("zero3", "zero3 offloaded", "zero3 hpz", "zero2", "zero1")
]


@pytest.mark.parametrize(("engine", "dtype"), RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(pools, tmp_path, engine, dtype):
    pool = pools(2)
    folder = str(tmp_path / "state")
    expected = pool.run(begin, folder, "llama", engine, dtype)
    found = pool.run(resume, folder, "llama", engine, dtype)
    assert found[0][0] == expected[0][0]
    assert found[0][2] == expected[0][2] == 7
    for rank in range(2):
        for name, value in expected[rank][1].items():
            assert torch.equal(found[rank][1][name], value), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(pools, tmp_path, family):
    folder, dtype = str(tmp_path / "state"), torch.float32
    losses, weights, _ = pools(2).run(begin, folder, family, "zero3", dtype)[0]
    elsewhere = {
        "3 ranks": pools(3).run(resume, folder, family, "zero3", dtype)[0],
        "1 rank": pools(1).run(resume, folder, family, "zero3", dtype)[0],
        "stage 2": pools(2).run(resume, folder, family, "zero2", dtype)[0],
        "no DeepSpeed": resume_without_deepspeed(folder, family),
    }
    for place, (found, after, *_) in elsewhere.items():
        assert found == pytest.approx(losses, abs=1e-5), place
        for name, value in weights.items():
            if ".dsee_" not in name:
                assert torch.equal(after[name], value), (place, name)


def test_a_run_moves_from_stage_2_to_3_with_dtype_bf16(pools, tmp_path):
    folder, dtype = str(tmp_path / "state"), torch.bfloat16
    losses, *_ = pools(2).run(begin, folder, "llama", "zero2", dtype)[0]
    found, *_ = pools(3).run(resume, folder, "llama", "zero3", dtype)[0]
    assert found == pytest.approx(losses, abs=2e-2)


def test_the_state_holds_no_base_weight_and_one_bit_per_masked_one(pools, tmp_path):
    pools(2).run(begin, str(tmp_path / "state"), "llama", "zero3", torch.float32)
    model = build(llama_config())
    base = {name: p.numel() for name, p in model.named_parameters()}
    tensors = {p.name: load_file(p) for p in (tmp_path / "state").glob("*.safetensors")}
    sizes = {name: t.numel() for file in tensors.values() for name, t in file.items()}
    assert all(sizes.values())
    masked = {name for name in sizes if name in base}
    assert masked and all(sizes[name] == (base[name] + 7) // 8 for name in masked)
    trained = sum(size for name, size in sizes.items() if name.endswith("/master"))
    adapter = sum(t.nbytes for t in tensors["dsee_adapter.safetensors"].values())
    bits = sum(sizes[name] for name in masked)
    total = sum(t.nbytes for file in tensors.values() for n, t in file.items() if "/torch" not in n)
    generators = sum(t.nbytes for file in tensors.values() for n, t in file.items() if n[0].isdigit())
    assert total <= adapter + bits + 12 * trained + generators
    assert len([name for name in tensors if name.startswith("dsee_optimizer")]) == 2


def make(family: str, engine: str | None, dtype: torch.dtype) -> nn.Module:
    """Injected, filled, pruned; whole where `engine` is None."""
    config, dsee = FAMILIES[family]
    model = build(config(), dtype) if engine is None else base_model(family, engine, dtype)
    dsee_scale.inject(model, dsee)
    for index, layer in enumerate(adapted_layers(model).values()):
        generator = torch.Generator().manual_seed(index)
        for param in (layer.dsee_B, layer.dsee_values):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="WABS", mask_update=False))
    return model


def save_all(folder: str, family: str, engine: str | None, dtype: torch.dtype, initialize: bool) -> None:
    model = make(family, engine, dtype)
    if initialize:
        model = engine_for(model, str(engine), dtype)
    save_adapter(model, f"{folder}/adapter")
    for form in ("masked", "dense", "separate"):
        report = export_model(model, f"{folder}/{form}", delta=form, max_shard_size="30KB")  # type: ignore[arg-type]
        assert report.num_zero > 0 and report.nbytes > 0


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != files.MANIFEST
    }


WRITERS = [(2, "zero3"), (3, "zero3"), (2, "zero3 hpz"), (2, "zero2")]
WRITTEN = [("llama", *writer, True) for writer in WRITERS] + [("gpt2", *writer, False) for writer in WRITERS]


@pytest.mark.parametrize(("family", "world_size", "engine", "initialize"), WRITTEN)
def test_files_are_byte_for_byte_those_of_one_process(
    pools, tmp_path, family, world_size, engine, initialize
):
    dtype = torch.bfloat16
    save_all(str(tmp_path / "one"), family, None, dtype, False)
    pools(world_size).run(save_all, str(tmp_path / "many"), family, engine, dtype, initialize)
    expected, found = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert found.keys() == expected.keys() and len(found) > 8
    for name, data in expected.items():
        assert found[name] == data, name


def logits_after_load(folder: str, family: str, engine: str) -> torch.Tensor:
    model = base_model(family, engine, torch.float32)
    load_adapter(model, folder)
    running = engine_for(model, engine, torch.float32)
    with torch.no_grad():
        return running(token_batch()).logits


@pytest.mark.parametrize(("world_size", "engine"), WRITERS)
def test_an_adapter_loads_into_a_partitioned_base(pools, tmp_path, world_size, engine):
    model = make("llama", None, torch.float32)
    save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        expected = model(token_batch()).logits
    for found in pools(world_size).run(logits_after_load, str(tmp_path / "a"), "llama", engine):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def ddp_run(folder: str, resumed: bool) -> list[float]:
    model = build(llama_config())
    if resumed:
        load_adapter(model, folder)
    else:
        dsee_scale.inject(model, FAMILIES["llama"][1])
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(wrapped), lr=1e-2)
    if resumed:
        load_training_state(wrapped, folder, optimizer=optimizer)
    losses = []
    for step in range(2 if resumed else 0, 4):
        if step == 2 and not resumed:
            save_training_state(wrapped, folder, optimizer=optimizer)
        ids = batch(step)
        loss = wrapped(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[-2:]


def test_a_run_under_ddp_goes_on_bit_for_bit(pools, tmp_path):
    folder = str(tmp_path / "state")
    assert pools(2).run(ddp_run, folder, False) == pools(2).run(ddp_run, folder, True)


def random_draws(folder: str | None, save: bool) -> list[float]:
    model = make("llama", "zero3", torch.float32)
    if save:
        torch.manual_seed(100 + dist.get_rank())
        save_training_state(model, str(folder))
    else:
        load_training_state(model, str(folder))
    return torch.rand(3).tolist()


def test_random_generators_go_on_per_rank_and_differ_on_new_ranks(pools, tmp_path):
    folder = str(tmp_path / "state")
    expected = pools(2).run(random_draws, folder, True)
    assert pools(2).run(random_draws, folder, False) == expected
    found = pools(3).run(random_draws, folder, False)
    assert found[:2] == expected and found[2] not in expected
    assert found == pools(3).run(random_draws, folder, False)


def caught(folder: str, task: str) -> str:
    """The message with which a rank refuses."""
    rank = dist.get_rank()
    model = (
        make("llama", "zero3", torch.float32)
        if task != "load"
        else base_model("llama", "zero3", torch.float32)
    )
    try:
        if task == "load":
            load_adapter(model, folder)
        elif task.startswith("full disk"):
            write = files.HashedFile.write
            if task.endswith(str(rank)):
                files.HashedFile.write = fail_when_full  # type: ignore[method-assign]
            try:
                if task == "full disk 0":
                    export_model(model, folder, overwrite=True)
                else:
                    save_training_state(model, folder, overwrite=True)
            finally:
                files.HashedFile.write = write  # type: ignore[method-assign]
        elif task == "occupied":
            save_adapter(model, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_when_full(file: files.HashedFile, data: Any) -> None:
    if file.size > (20_000 if file.path.name.startswith("model") else 2000):
        raise OSError(28, "No space left on device", str(file.path))
    file._file.write(data)
    file._hash.update(data)
    file.size += memoryview(data).nbytes


def test_every_rank_raises_the_same_error_and_the_old_content_stays(pools, tmp_path):
    model = make("llama", None, torch.float32)
    export_model(model, tmp_path / "out")
    save_adapter(model, tmp_path / "a")
    before = contents(tmp_path / "out")
    full = pools(3).run(caught, str(tmp_path / "out"), "full disk 0")
    assert len(set(full)) == 1 and full[0].startswith("FormatError") and "No space left" in full[0]
    assert contents(tmp_path / "out") == before
    full = pools(3).run(caught, str(tmp_path / "state"), "full disk 2")
    assert len(set(full)) == 1 and "-00003-of-00003.safetensors: No space left" in full[0]
    assert not (tmp_path / "state").exists()
    occupied = pools(3).run(caught, str(tmp_path / "a"), "occupied")
    assert len(set(occupied)) == 1 and "not empty" in occupied[0]
    mask = tmp_path / "a" / "dsee_masks.safetensors"  # only the rank that checks this file can notice
    data = bytearray(mask.read_bytes())
    data[-1] ^= 16
    mask.write_bytes(data)
    damaged = pools(3).run(caught, str(tmp_path / "a"), "load")
    assert len(set(damaged)) == 1 and "dsee_masks.safetensors is damaged" in damaged[0]
    assert {p.name for p in tmp_path.iterdir()} == {"out", "a"}


def refuse_without_zero(folder: str) -> str:
    model = base_model("llama", "no zero", torch.bfloat16)
    dsee_scale.inject(model, FAMILIES["llama"][1])
    try:
        save_training_state(engine_for(model, "no zero", torch.bfloat16), folder)
    except dsee_scale.PartitionError as error:
        return str(error)
    return ""


def test_an_optimizer_that_cannot_be_reached_is_refused_by_name(pools, tmp_path):
    for message in pools(2).run(refuse_without_zero, str(tmp_path / "state")):
        assert "FP16_UnfusedOptimizer is not supported; use ZeRO stage 1, 2 or 3" in message
    assert not list(tmp_path.iterdir())


def test_a_training_state_can_be_exported_without_an_engine(pools, tmp_path):
    _, weights, _ = pools(2).run(begin, str(tmp_path / "state"), "llama", "zero3", torch.float32)[0]
    model = build(llama_config())
    load_adapter(model, tmp_path / "state")
    for name, param in model.named_parameters():
        if ".dsee_" not in name:
            assert torch.equal(param, weights[name]), name
    with pytest.raises(FormatError, match="expected: export"):
        files.open_folder(tmp_path / "state", ("export",))


def loaded_by_deepspeed(folder: str, engine: str, pruning: PruneConfig | None, use: str) -> list[int]:
    """Warnings of a mask without a record: while DeepSpeed loads its own checkpoint, in the next use, and after it."""
    runs = []
    for _ in range(2):
        model = base_model("llama", engine, torch.float32)
        dsee_scale.inject(model, FAMILIES["llama"][1])
        runs.append(engine_for(model, engine, torch.float32))
    running, fresh = runs
    train(running, range(1))
    if pruning is not None:
        dsee_scale.prune(running, pruning)
    train(running, range(1, 2))
    running.save_checkpoint(f"{folder}/deepspeed")
    uses = {
        "train": lambda: train(fresh, range(1)),
        "save": lambda: save_training_state(fresh, f"{folder}/state", overwrite=True),
        "export": lambda: export_model(fresh, f"{folder}/export", overwrite=True),
        "prune": lambda: dsee_scale.prune(fresh, PruneConfig(sparsity=0.5, score="W", mask_update=False)),
    }
    found = []
    for call in (lambda: fresh.load_checkpoint(f"{folder}/deepspeed"), uses[use], uses["train"]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found.append(sum("no state dict says that they are a mask" in str(each.message) for each in caught))
    return found


HALF = PruneConfig(sparsity=0.5, score="W")
KEEPS_UPDATE = PruneConfig(sparsity=0.5, score="W", mask_update=False)
LAYERS = 6
"""Adapted ones of the llama here."""


@pytest.mark.parametrize(
    ("engine", "pruning", "use", "expected"),
    [
        ("zero3", HALF, "train", [0, LAYERS, 0]),
        ("zero3", KEEPS_UPDATE, "export", [0, LAYERS, 0]),
        ("zero3 resident", HALF, "save", [0, LAYERS, 0]),
        ("zero3 offloaded", HALF, "prune", [0, LAYERS, 0]),
        ("zero3", None, "train", [0, 0, 0]),
        ("zero2", HALF, "train", [LAYERS, 0, 0]),
    ],
)
def test_a_mask_that_deepspeeds_checkpoint_brings_along_is_warned_of(
    pools, tmp_path, engine, pruning, use, expected
):
    """The shards of ZeRO-3 come after the state dict, so that the next use is the first to see them."""
    assert pools(2).run(loaded_by_deepspeed, str(tmp_path), engine, pruning, use) == [expected] * 2


def saved_where_a_rank_holds_nothing(folder: str, empty: bool) -> None:
    """As rank 1 would be whose share of each trained tensor is padding alone, right after a load."""
    model = base_model("llama", "zero3", torch.float32)
    dsee_scale.inject(model, FAMILIES["llama"][1])
    engine = engine_for(model, "zero3", torch.float32)
    train(engine, range(2))
    with pytest.MonkeyPatch.context() as patch:
        if empty and dist.get_rank() == 1:
            patch.setattr(OptimizerState, "moments", lambda _: [])
            patch.setattr(OptimizerState, "scalars", lambda _: {})
        save_training_state(engine, folder)


def test_a_rank_that_holds_no_entry_follows_what_the_others_save(pools, tmp_path):
    for name in ("usual", "empty"):
        pools(2).run(saved_where_a_rank_holds_nothing, str(tmp_path / name), name == "empty")
    assert contents(tmp_path / "usual") == contents(tmp_path / "empty")


def scales(folder: str, stage: int) -> tuple[float, float]:
    import deepspeed

    def make(adapter: str | None) -> Any:
        config = zero3_config(stage=stage)
        config |= {
            "torch_autocast": {"enabled": True, "dtype": "float16"},
            "train_micro_batch_size_per_gpu": 3,
        }
        model = build(llama_config())
        model = partition(model, config) if stage == 3 else model
        if adapter is None:
            dsee_scale.inject(model, FAMILIES["llama"][1])
        else:
            load_adapter(model, adapter)
        params = dsee_scale.trainable_parameters(model)
        return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]

    with pytest.MonkeyPatch.context() as patch:
        # Which DeepSpeed leaves set for every later engine of a process.
        patch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)
        engine = make(None)
        train(engine, range(1))
        engine.optimizer.torch_autocast_gradscaler.update(new_scale=128.0)
        train(engine, range(1, 2))
        save_training_state(engine, folder)
        again = make(folder)
        before = again.optimizer.torch_autocast_gradscaler.get_scale()
        load_training_state(again, folder)
        return before, again.optimizer.torch_autocast_gradscaler.get_scale()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_scale_of_torch_autocast_in_float16_is_resumed(pools, tmp_path, stage):
    for before, after in pools(2).run(scales, str(tmp_path / "state"), stage):
        assert (before, after) == (65536.0, 128.0)
