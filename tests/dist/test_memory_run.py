"""Whole runs that save memory, under real ZeRO-3: nf4 with 8-bit Adam, and everything on the CPU, both resumed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.run_inputs import DEEPSPEED, losses, tiny_recipe, zero_share
from tests.dist.test_run import LONG, run_recipe

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.timeout(900)

ON_CPU = {"device": "cpu", "pin_memory": False}


def nf4_with_8_bit_adam(inputs: Path, output: Path) -> dict[str, Any]:
    deepspeed = {key: value for key, value in copy.deepcopy(DEEPSPEED).items() if key != "optimizer"}
    # Tensors below 4,096 entries keep 32-bit moments.
    large = {"rank": 24, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    return tiny_recipe(
        inputs,
        output,
        model={
            "name": str(inputs / "model"),
            "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        },
        dsee={"num_sparse": 8, "decomposition": {"rank": 4}, **large},
        training__deepspeed=deepspeed,
        training__optim="adamw_bnb_8bit",
    )


def offloaded(inputs: Path, output: Path) -> dict[str, Any]:
    deepspeed = copy.deepcopy(DEEPSPEED)
    deepspeed["zero_optimization"] |= {"offload_param": ON_CPU, "offload_optimizer": ON_CPU}
    del deepspeed["optimizer"]["params"]["torch_adam"]
    return tiny_recipe(inputs, output, training__deepspeed=deepspeed)


@pytest.mark.parametrize("settings", [nf4_with_8_bit_adam, offloaded])
def test_a_run_that_saves_memory_tunes_prunes_exports_and_resumes(pools, inputs, tmp_path, settings):
    pools(2).run(run_recipe, settings(inputs, tmp_path / "run"), timeout=LONG)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    phases = {phase["phase"]: phase for phase in metrics["phases"]}
    assert phases["tuned"]["quality"]["loss"] < phases["before"]["quality"]["loss"] - 0.1
    assert phases["retuned"]["quality"]["loss"] < phases["pruned"]["quality"]["loss"]
    zeros, entries = zero_share(tmp_path / "run" / "model")
    assert phases["pruned"]["zeros"] == phases["retuned"]["zeros"] == round(entries / 2) <= zeros
    exported = phases["exported"]
    assert exported["dsee_scale_imported"] is False and exported["same_tokens"] is True
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-8", resumed / "checkpoint-8")
    values = settings(inputs, resumed)
    values["training"]["resume_from_checkpoint"] = True
    pools(2).run(run_recipe, values, timeout=LONG)
    there, here = losses(tmp_path / "run"), losses(resumed)
    tolerance = 1e-5 if settings is offloaded else 2e-3  # 8-bit moments are rounded once more
    assert [here[step] for step in (9, 10, 11)] == pytest.approx(
        [there[step] for step in (9, 10, 11)], abs=tolerance
    )


def eight_bit_loop(folder: Path, name: str) -> list[float]:
    """A plain DeepSpeed program with an optimizer of its own."""
    import bitsandbytes as bnb
    import deepspeed

    import dsee_scale
    from tests.quantised import BATCH, DSEE, quantised_llama

    model = quantised_llama(folder, "nf4")
    dsee_scale.inject(model, DSEE)
    optimizer = getattr(bnb.optim, name)(dsee_scale.trainable_parameters(model), lr=1e-2, min_8bit_size=1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = []
    for _ in range(5):
        loss = engine(input_ids=BATCH, labels=BATCH).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    state = next(iter(optimizer.state.values()))
    assert state["state1"].dtype == (torch.float32 if name.endswith("32bit") else torch.uint8)
    dsee_scale.save_adapter(engine, folder / f"adapter-{name}")
    return found


def test_8_bit_and_paged_optimizers_run_in_a_plain_deepspeed_loop(pools, tmp_path):
    from tests.quantised import write_llama

    write_llama(tmp_path)
    exact = pools(2).run(eight_bit_loop, tmp_path, "PagedAdamW32bit")[0]
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        found = pools(2).run(eight_bit_loop, tmp_path, name)[0]
        assert found == pytest.approx(exact, abs=0.03) and found[-1] < found[0] - 0.05


def eight_bit_states(folder: Path, stage: int) -> tuple[list[float], list[float]]:
    """Losses of steps 3 to 5 of a run, and of one that goes on from its state after step 2."""
    import bitsandbytes as bnb
    import deepspeed

    import dsee_scale
    from dsee_scale.checkpoint.adapter import load_adapter
    from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
    from dsee_scale.partition.engine_state import open_optimizer
    from tests.models import build, llama_config, token_batch

    def start(*, resumed: bool) -> Any:
        model = build(llama_config(), torch.bfloat16)
        if resumed:
            load_adapter(model, folder)
        else:
            dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=3, num_sparse=7, target_modules=("q_proj",)))
        params = dsee_scale.trainable_parameters(model)
        optimizer = bnb.optim.AdamW8bit(params, lr=3e-2, min_8bit_size=1)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def train(engine: Any, steps: range) -> list[float]:
        found = []
        for step in steps:
            ids = token_batch(batch=4, seed=step)
            loss = engine(ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            found.append(float(loss.detach()))
        return found

    engine = start(resumed=False)
    save_training_state(engine, folder / "unstepped")
    train(engine, range(2))
    save_training_state(engine, folder / "state")
    there = train(engine, range(2, 5))
    folder /= "state"
    engine = start(resumed=True)
    for first in (folder.parent / "unstepped", folder):
        load_training_state(engine, first)
    states = list(open_optimizer(engine).stretches.values())
    assert all(one.state["state1"].dtype == torch.uint8 and one.state["step"] == 2 for one in states)
    return there, train(engine, range(2, 5))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_8_bit_moments_stay_in_8_bits_in_a_resumed_plain_deepspeed_loop(pools, tmp_path, stage):
    there, here = pools(2).run(eight_bit_states, tmp_path, stage)[0]
    assert here == pytest.approx(there, abs=2e-2)
