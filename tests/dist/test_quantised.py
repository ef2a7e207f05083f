"""Bases quantised by bitsandbytes under DDP, ZeRO-2 and ZeRO-3 against one process."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.partition.quantized import quantised_layers
from tests.models import zero3_config
from tests.quantised import BATCH, FORMATS, evaluate, injected_llama, quantised_llama, write_llama

pytest.importorskip("bitsandbytes")
PRUNE = PruneConfig(sparsity=0.5, score="WABS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def ds_config(engine: str) -> dict[str, Any]:
    config = zero3_config(torch.bfloat16)
    config["optimizer"]["params"]["weight_decay"] = 0.0
    if engine == "zero2":
        config["zero_optimization"] = {"stage": 2}
    if engine == "zero3 offloaded":
        on_cpu = {"device": "cpu", "pin_memory": False}
        config["zero_optimization"] |= {"offload_param": on_cpu, "offload_optimizer": on_cpu}
        del config["optimizer"]["params"]["torch_adam"], config["zero_force_ds_cpu_optimizer"]
    if engine == "zero3 hpz":
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
    return config


def whole_entries(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    module = unwrap(model)
    layers = dict(quantised_layers(module))
    port = open_partition(model)
    stream = port.gather_each([layer.weight for layer in layers.values()])
    return {name: whole.clone() for name, whole in zip(layers, stream, strict=True) if whole is not None}


def alive() -> dict[int, weakref.ref[torch.Tensor]]:
    """Every tensor of this process, without holding on to it."""
    return {id(o): weakref.ref(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}


def codes_alive(model: torch.nn.Module, others: dict[int, weakref.ref[torch.Tensor]]) -> int:
    """Bytes of code-like tensors in this process, each storage once: what is saved for backward included.

    Not those of `others`, which were there before: a rank of the pool has run other tests.
    """
    wanted = {layer.weight.dtype for _, layer in quantised_layers(model)} - {torch.bfloat16}
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.dtype in wanted]
    found = [o for o in found if id(o) not in others or others[id(o)]() is not o]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in found}.values())


def story(folder: Path, form: str, engine: str, out: Path | None = None) -> dict[str, Any]:
    """Evaluate, train, prune, train; what a run sees."""
    import deepspeed

    others = alive()
    raw = injected_llama(folder, form)
    supports = {n: torch.stack([m.dsee_rows, m.dsee_cols]) for n, m in adapted_layers(raw).items()}
    before = evaluate(raw)
    trained = dsee_scale.trainable_parameters(raw)
    optimizer: Any = None
    model: Any = raw
    if engine.startswith("zero"):
        model, *_ = deepspeed.initialize(model=raw, model_parameters=trained, config=ds_config(engine))
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        model = torch.nn.parallel.DistributedDataParallel(raw) if engine == "ddp" else raw
    losses, gradients, gathered = [evaluate(model)], [], 0
    for step in range(6):
        if step == 3:
            report = dsee_scale.prune(model, PRUNE)
            losses.append(evaluate(model))
        loss = model(input_ids=BATCH, labels=BATCH).loss
        losses.append(float(loss.detach()))
        gathered = max(gathered, codes_alive(raw, others))
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            gradients.append(min(float(p.grad.abs().max()) for p in trained))
            optimizer.step()
            optimizer.zero_grad()
    losses.append(evaluate(model))
    if out is not None:
        dsee_scale.save_adapter(model, out / "adapter")
        dsee_scale.export_model(model, out / "model")
    held = sum(layer.weight.numel() for _, layer in quantised_layers(raw))
    entries = whole_entries(model)
    return {
        "supports": supports,
        "before": before,
        "losses": losses,
        "gradients": gradients,
        "held": held,
        "gathered": gathered,
        "entries": entries,
        "zeros": report.removed,
    }


@functools.cache
def story_alone(folder: Path, form: str) -> dict[str, Any]:
    """In this process, without an engine."""
    return story(folder, form, "none")


@pytest.mark.parametrize("form", list(FORMATS))
def test_zero3_trains_and_prunes_as_one_process_does(pools, folder, form):
    alone = story_alone(folder, form)
    assert min(alone["gradients"][1:]) > 0 and alone["losses"][-1] < alone["losses"][0] - 0.1
    for world_size in (2, 3) if form == "nf4" else (2,):
        ranks = pools(world_size).run(story, folder, form, "zero3")
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], abs=0.02)
            assert rank["held"] == 0  # between uses nobody holds a whole weight,
            assert (
                rank["gathered"] <= alone["gathered"] * 2 / world_size
            )  # and a forward keeps none for backward
            assert rank["before"] == alone["before"]
        _assert_same_weights(ranks, alone)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_what_zero3_saves_is_what_one_process_loads(pools, folder, tmp_path, form):
    ranks = pools(2).run(story, folder, form, "zero3", tmp_path)
    loaded = quantised_llama(folder, form)
    dsee_scale.load_adapter(loaded, tmp_path / "adapter")
    assert evaluate(loaded) == pytest.approx(ranks[0]["losses"][-1], abs=1e-3)
    dsee_scale.export_model(loaded, tmp_path / "again")
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3 offloaded", "zero3 hpz"])
def test_other_engines_train_and_prune_as_one_process_does(pools, folder, form, engine):
    alone = story_alone(folder, form)
    ranks = pools(2).run(story, folder, form, engine)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], abs=0.02)
    _assert_same_weights(ranks, alone)


def _assert_same_weights(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        for name, support in alone["supports"].items():
            assert torch.equal(rank["supports"][name], support), name
    assert ranks[0]["zeros"] == alone["zeros"]
    agree = total = 0
    for name, entries in alone["entries"].items():
        agree += int(((ranks[0]["entries"][name] == 0) == (entries == 0)).sum())
        total += entries.numel()
        kept = (entries != 0) & (ranks[0]["entries"][name] != 0)
        assert torch.equal(entries[kept], ranks[0]["entries"][name][kept]), name
    # The adapters were trained with other rounding, and the score reads them.
    assert agree / total > 0.995
