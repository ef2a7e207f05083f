"""Edits of trained parameters between the steps of a DeepSpeed optimizer: refused, or forgotten for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dsee_scale
from dsee_scale import ConfigError, PartitionError, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.partition.engine_state import open_optimizer
from dsee_scale.pruning.zero_lines import Lines, zero_lines
from tests.dist.test_inject_prune import ENGINES, engine_for, train, whole_weights, zero3_engine_config
from tests.dist.test_patterns import make, stage_config, zeros_of_units
from tests.models import token_batch


def between_micro_steps(stage: int) -> list[str]:
    """Heads are removed at every place of a step; where that was refused."""
    config = {**stage_config(stage), "gradient_accumulation_steps": 2}
    engine = engine_for(make("llama", torch.bfloat16, config if stage == 3 else None), config)
    refused = []

    def remove_heads(place: str) -> None:
        before = whole_weights(engine)
        try:
            dsee_scale.prune(engine, PruneConfig(pattern="heads", num_per_layer=2, score="W"))
        except PartitionError as error:
            assert "right after the engine.step()" in str(error)
            assert all(torch.equal(before[name], new) for name, new in whole_weights(engine).items())
            refused.append(place)

    for micro_step in ("first", "second"):
        ids = token_batch()
        engine.backward(engine(ids, labels=ids).loss)
        remove_heads(f"after the {micro_step} backward")
        engine.step()
        remove_heads(f"after the {micro_step} step")
    expected = zeros_of_units(unwrap(engine), ("heads",))
    train(engine, 2)
    after = whole_weights(engine)
    assert not any(after[name].reshape(-1)[lines].any() for name, lines in expected.items())
    return refused


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_units_are_not_removed_while_gradients_wait(pools, stage):
    expected = ["after the first backward", "after the first step", "after the second backward"]
    assert pools(2).run(between_micro_steps, stage) == [expected] * 2


def units_without_the_engine(stage: int) -> str:
    """What is said of heads that are removed from the model of an engine that trains in bfloat16."""
    config = stage_config(stage)
    engine = engine_for(make("llama", torch.bfloat16, config if stage == 3 else None), config)
    train(engine, 1)
    before = whole_weights(engine)
    with pytest.raises(PartitionError) as found:
        dsee_scale.prune(unwrap(engine), PruneConfig(pattern="heads", num_per_layer=2, score="W"))
    assert all(torch.equal(before[name], new) for name, new in whole_weights(engine).items())
    return str(found.value)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_units_are_not_removed_behind_the_engines_back(pools, stage):
    """Its masters and moments would bring them back."""
    assert all("pass the engine" in error for error in pools(2).run(units_without_the_engine, stage))


def saves_in_an_accelerate_loop(folder: Path, stage: int) -> list[str]:
    """A state is asked for at every place of two optimizer steps of two micro-batches; where that was refused."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DummyOptim

    config = {**stage_config(stage), "gradient_accumulation_steps": 2}
    model = make("llama", torch.bfloat16, config if stage == 3 else None)
    refused = []

    def save(engine: Any, place: str) -> None:
        try:
            save_training_state(engine, folder, overwrite=True)
        except ConfigError as error:
            assert "would be lost" in str(error)
            refused.append(place)

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        patch.setenv("LOCAL_RANK", str(dist.get_rank()))
        accelerator = Accelerator(
            gradient_accumulation_steps=2, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)
        )
        engine, _ = accelerator.prepare(model, DummyOptim(dsee_scale.trainable_parameters(model)))
        save(engine, "at the beginning")
        for step in (1, 2):
            for micro_step in (1, 2):
                ids = token_batch()
                with accelerator.accumulate(engine):  # the engine makes its steps in here
                    accelerator.backward(engine(ids, labels=ids).loss)
                save(engine, f"step {step}, micro-batch {micro_step}")
        assert engine.global_steps == 2
        load_training_state(engine, folder)
        save(engine, "after loading")
    AcceleratorState._reset_state(reset_partial_state=True)
    return refused


@pytest.mark.parametrize("stage", [2, 3])
def test_an_accelerate_loop_saves_between_its_steps_and_not_within_one(pools, tmp_path, stage):
    expected = ["step 1, micro-batch 1", "step 2, micro-batch 1"]
    assert pools(2).run(saves_in_an_accelerate_loop, tmp_path / "state", stage) == [expected] * 2


def reset_adapters(stage: int, zero: dict[str, Any]) -> None:
    """All adapters are set to zero; they are then trained as if they had never been."""
    dtype = torch.bfloat16
    config = zero3_engine_config(dtype, zero) if stage == 3 else stage_config(stage)
    config["zero_optimization"] |= zero if stage != 3 else {}
    engine = engine_for(make("llama", dtype, config if stage == 3 else None), config)
    train(engine, 2)
    layers = adapted_layers(unwrap(engine))
    names = [f"{name}.dsee_flat" for name in layers]
    port = open_partition(engine)
    every = torch.ones(1, dtype=torch.bool)
    before = whole_weights(engine)
    masters = open_optimizer(engine).gather([(name, "master") for name in names])
    for name, master in zip(names, masters, strict=True):
        assert torch.equal(master.to(dtype).view_as(before[name]), before[name]), name
    params = [layer.dsee_flat for layer in layers.values()]
    zero_lines(engine, port, [Lines(param, 0, every, (1, port.shape(param).numel())) for param in params])
    kept = open_optimizer(engine)
    for key in ("master", *kept.moments()):
        for name, found in zip(names, kept.gather([(name, key) for name in names]), strict=True):
            assert not found.any(), (key, name)
    after = whole_weights(engine)
    assert all(torch.equal(before[name], new) for name, new in after.items() if name not in names)
    train(engine, 1)
    moved = whole_weights(engine)
    rate = config["optimizer"]["params"]["lr"]
    for (
        name
    ) in names:  # Adam's first step is at most the learning rate, a later one with no memory a bit more
        assert not after[name].any() and 0 < moved[name].float().abs().max() < 8 * rate, name


ROUND_ROBIN = {"round_robin_gradients": True}
"""DeepSpeed then keeps the parameters of a group in another order."""


@pytest.mark.parametrize("kind", [1, 2, "round robin", *ENGINES])
def test_zeroed_parameters_start_anew(pools, kind):
    stages = {1: (1, {}), 2: (2, {}), "round robin": (2, ROUND_ROBIN)}
    pools(2).run(reset_adapters, *(stages[kind] if kind in stages else (3, ENGINES[kind])))
