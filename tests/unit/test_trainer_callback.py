"""A stock Trainer with one callback: tuned, pruned, retuned, with checkpoints that hold no base weight."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import dsee_scale
from dsee_scale import CubicSchedule, DSEECallback, DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import ConfigError, FormatError, RunError, TargetError
from dsee_scale.passes.pools import block_linears
from tests.models import build, llama_config, token_batch

CONFIG = DSEEConfig(rank=2, num_sparse=5, target_modules=("q_proj", "down_proj"), support="magnitude")


class StockTrainer(Trainer):
    """As a user's own subclass would be."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in token_batch(batch=24, length=10)]


def model_of(base: Path | None = None) -> Any:
    return build(llama_config()) if base is None else AutoModelForCausalLM.from_pretrained(base)


def trainer_of(model: Any, folder: Path, callback: DSEECallback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
    )
    args = TrainingArguments(
        **(settings | changes), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, seed=3
    )
    return StockTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), callbacks=[callback])


def flats(model: Any) -> list[torch.Tensor]:
    return [layer.dsee_flat.detach().clone() for layer in adapted_layers(model).values()]


def zeros(model: Any) -> int:
    return sum(int((m.weight == 0).sum()) for m in block_linears(model).values())


def total(model: Any) -> int:
    return sum(m.weight.numel() for m in block_linears(model).values())


PRUNINGS = {
    "refit": (PruneConfig(), 0.5),
    "wanda": (PruneConfig(refit=False, scope="global"), 3),
    "magnitude": (PruneConfig(score="WABS", mask_update=False), 3),
}


@pytest.mark.parametrize("name", list(PRUNINGS))
def test_it_prunes_on_the_way_saves_no_base_weight_and_resumes_exactly(tmp_path, name):
    prune, at = PRUNINGS[name]
    model = model_of()
    model.save_pretrained(tmp_path / "published")
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback(prune, at))
    trainer.train()
    assert type(trainer).__name__ == "StockTrainer" and isinstance(trainer, StockTrainer)
    # The solver keeps one entry more or less where a row does not divide evenly.
    assert zeros(model) == round(total(model) / 2) or (
        prune.refit and abs(zeros(model) / total(model) - 0.5) < 0.02
    )
    assert any("sparsity" in entry for entry in trainer.state.log_history)
    # The pruning's own log takes no step's loss away.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    with safe_open(checkpoint / "dsee_adapter.safetensors", "pt") as file:
        assert all(".dsee_" in key for key in file.keys())  # noqa: SIM118 (the reader is no mapping)
    trained = sum(flat.numel() for flat in flats(model))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size < 4 * 4 * trained + total(model) / 8 + 80_000
    expected, sparse = flats(model), {n: m.weight == 0 for n, m in block_linears(model).items()}

    again = model_of((tmp_path / "run" / "base") if prune.refit else (tmp_path / "published"))
    dsee_scale.load_adapter(again, checkpoint)
    resumed = trainer_of(again, tmp_path / "run", DSEECallback(prune, at))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for found, wanted in zip(flats(again), expected, strict=True):
        assert torch.equal(found, wanted)
    for module, mask in sparse.items():
        assert torch.equal(block_linears(again)[module].weight == 0, mask)


AT_A_SAVE = {
    "refit": PruneConfig(),
    "heads": PruneConfig(pattern="heads", num_per_layer=2, score="W", refit=False),
    "neurons refit by magnitude": PruneConfig(pattern="neurons", num_per_layer=8, score="W", refit=True),
}


@pytest.mark.parametrize("name", list(AT_A_SAVE))
def test_a_checkpoint_of_the_very_step_that_pruned_resumes_exactly(tmp_path, name):
    """What the optimizer is to forget of removed lines and old supports is forgotten there too."""
    prune = AT_A_SAVE[name]
    config = dataclasses.replace(CONFIG, target_modules=("q_proj", "o_proj", "up_proj", "down_proj"))
    model = build(llama_config(num_attention_heads=4, num_key_value_heads=2, hidden_size=32))
    model.save_pretrained(tmp_path / "published")
    dsee_scale.inject(model, config)
    trainer_of(model, tmp_path / "run", DSEECallback(prune, 2)).train()
    again = model_of((tmp_path / "run" / "base") if prune.refit else (tmp_path / "published"))
    dsee_scale.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    resumed = trainer_of(again, tmp_path / "run", DSEECallback(prune, 2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for found, wanted in zip(flats(again), flats(model), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_inputs_are_noted_until_the_last_pruning_and_no_longer(tmp_path):
    """On a GPU each note waits for a copy to the host."""
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    callback = DSEECallback(PruneConfig(refit=False), 3)
    noted = []
    callback.on_step_begin = lambda args, state, control, **_: noted.append(len(callback._inputs))
    trainer = trainer_of(model, tmp_path / "run", callback)
    trainer.train()
    assert noted == [0, 1, 2, 0, 0, 0]
    trainer.train()
    assert noted[6:] == [0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize(("kept", "accumulated"), [(64, 1), (5, 2)])
def test_a_resumed_pruning_sees_what_the_uninterrupted_one_saw(tmp_path, kept, accumulated):
    """Within an epoch of six batches, and over its end."""

    def train(checkpoint: Path | None) -> tuple[Any, list[torch.Tensor]]:
        model = model_of(tmp_path / "published")
        if checkpoint is None:
            dsee_scale.inject(model, CONFIG)
        else:
            dsee_scale.load_adapter(model, checkpoint)
        callback, seen = DSEECallback(PruneConfig(), 5, calibration_batches=kept), []
        calibration = callback._calibration
        callback._calibration = lambda: seen.extend(calibration()) or seen
        settings = dict(save_steps=4, max_steps=6, gradient_accumulation_steps=accumulated)
        trainer_of(model, tmp_path / "run", callback, **settings).train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
        return model, [batch["input_ids"] for batch in seen]

    model_of().save_pretrained(tmp_path / "published")
    straight, expected = train(None)
    resumed, seen = train(tmp_path / "run" / "checkpoint-4")
    assert [ids.tolist() for ids in seen] == [ids.tolist() for ids in expected]
    assert len(seen) == min(kept, 5 * accumulated)
    for found, wanted in zip(flats(resumed), flats(straight), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_checkpoint_before_the_pruning_is_pruned_when_it_is_resumed(tmp_path):
    prune = PruneConfig(score="W")
    model = model_of()
    model.save_pretrained(tmp_path / "published")
    dsee_scale.inject(model, CONFIG)
    trainer_of(model, tmp_path / "run", DSEECallback(prune, 3)).train()
    again = model_of(tmp_path / "published")
    dsee_scale.inject(again, CONFIG)  # the same supports: the checkpoint brings the rest
    trainer_of(again, tmp_path / "run", DSEECallback(prune, 3)).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert zeros(again) == zeros(model)
    for found, wanted in zip(flats(again), flats(model), strict=True):
        assert torch.equal(found, wanted)


def test_a_checkpoint_meets_only_the_base_that_it_was_made_with(tmp_path):
    """Killed between a re-fit and the next checkpoint, a run has a base that its checkpoints do not belong to."""
    config = dataclasses.replace(CONFIG, num_sparse=0)  # no positions whose difference would tell
    model = model_of()
    model.save_pretrained(tmp_path / "published")
    model = model_of(tmp_path / "published")
    dsee_scale.inject(model, config)
    trainer_of(model, tmp_path / "run", DSEECallback(PruneConfig(), 3)).train()
    published, refitted = tmp_path / "published", tmp_path / "run" / "base"
    before, after = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    assert dsee_scale.base_of(before, str(published)) == str(published)
    assert dsee_scale.base_of(after, str(published)) == str(refitted)
    for base, checkpoint, words in (
        (refitted, before, f"holds an update already.*load {published}"),
        (published, after, "weights were re-fitted"),
    ):
        wrong = model_of(base)
        with pytest.raises(FormatError, match=words):
            dsee_scale.load_adapter(wrong, checkpoint)
        dsee_scale.inject(wrong, config)
        with pytest.raises(FormatError, match=words):
            trainer_of(wrong, tmp_path / "again", DSEECallback()).train(
                resume_from_checkpoint=str(checkpoint)
            )
    with pytest.raises(FormatError, match="base is missing"):
        shutil.copytree(after, tmp_path / "alone")
        dsee_scale.base_of(tmp_path / "alone", str(published))

    # A new training may begin with what the re-fit left, and what it leaves itself is another model.
    fresh = model_of(refitted)
    dsee_scale.inject(fresh, config)
    dsee_scale.save_adapter(fresh, tmp_path / "second")
    dsee_scale.export_model(fresh, tmp_path / "merged")
    assert not dsee_scale.load_adapter(model_of(refitted), tmp_path / "second").refitted
    with pytest.raises(FormatError, match="weights were re-fitted"):
        dsee_scale.load_adapter(model_of(published), tmp_path / "second")
    another = model_of(tmp_path / "merged")
    dsee_scale.inject(another, config)
    dsee_scale.save_adapter(another, tmp_path / "third")
    second, third = (
        json.loads((tmp_path / name / "dsee_config.json").read_text())["base_model"]["refit"]
        for name in ("second", "third")
    )
    assert second and third and second != third


def test_a_schedule_prunes_to_a_rising_sparsity(tmp_path):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    schedule = CubicSchedule(final_sparsity=0.6, start_step=1, num_steps=4, every=2)
    callback = DSEECallback(PruneConfig(sparsity=0.6, score="W"), schedule)
    trainer = trainer_of(model, tmp_path / "run", callback)
    trainer.train()
    found = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert found == pytest.approx([schedule.sparsity(step) for step in (1, 3, 5)], abs=1e-4)
    assert zeros(model) == round(0.6 * total(model))


def test_several_prunings_before_the_first_step_see_the_first_batches(tmp_path):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    configs = [
        PruneConfig(pattern="neurons", num_per_layer=13),
        PruneConfig(pattern="2:4", modules=("q_proj",)),
    ]
    trainer = trainer_of(model, tmp_path / "run", DSEECallback(configs, 0), max_steps=2)
    trainer.train()
    for layer in model.model.layers:
        assert int((layer.mlp.up_proj.weight == 0).all(1).sum()) == 13
        assert int((layer.self_attn.q_proj.weight == 0).sum()) == layer.self_attn.q_proj.weight.numel() // 2
    trainer.save_model()
    again = model_of(tmp_path / "run" / "base")
    assert dsee_scale.load_adapter(again, tmp_path / "run" / "adapter").pruned


SCHEDULERS = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "steps": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4], gamma=0.5),
    "plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
    "lambdas": lambda opt: torch.optim.lr_scheduler.LambdaLR(
        opt, [lambda step: 0.9**step, lambda step: 0.5**step]
    ),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_any_scheduler_goes_on_where_it_was(tmp_path, name):
    def train(checkpoint: Path | None) -> list[list[float]]:
        model = model_of()
        if checkpoint is None:
            dsee_scale.inject(model, CONFIG)
        else:
            dsee_scale.load_adapter(model, checkpoint)
        first, *others = dsee_scale.trainable_parameters(model)
        optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others}], lr=1e-2)
        evaluated = (
            dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
            if name == "plateau"
            else {}
        )
        callback, rates = DSEECallback(), []
        callback.on_step_begin = lambda *_, **__: rates.append([g["lr"] for g in optimizer.param_groups])
        trainer = trainer_of(model, tmp_path / "run", callback, save_steps=3, **evaluated)
        trainer.optimizer, trainer.lr_scheduler = optimizer, SCHEDULERS[name](optimizer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return rates

    straight = train(None)
    assert len({rates[1] for rates in straight}) > 2
    assert train(tmp_path / "run" / "checkpoint-3") == straight[3:]


def test_a_scheduler_that_no_checkpoint_can_hold_is_refused_at_the_start(tmp_path):
    class Bound(torch.optim.lr_scheduler.ExponentialLR):
        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer, 0.9)
            self.rule = abs

    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback())
    trainer.optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    trainer.lr_scheduler = Bound(trainer.optimizer)
    with pytest.raises(ConfigError, match=r"lr_scheduler Bound\.rule is a builtin"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_a_pruning_it_keeps_checkpoints_small_and_deletes_old_ones(tmp_path):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback(), save_total_limit=1)
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert zeros(model) == 0
    with pytest.raises(ConfigError, match="examples per step"):
        trainer_of(model, tmp_path / "run", DSEECallback(), gradient_accumulation_steps=2).train(
            resume_from_checkpoint=True
        )


def test_what_makes_no_sense_is_refused(tmp_path):
    refused = {
        "go together": (PruneConfig(), None),
        "no fraction": (PruneConfig(), 1.5),
        "step from 0": (PruneConfig(), -1),
        "neither a fraction of the training nor a step": (PruneConfig(), True),
        "does not go with refit": (
            PruneConfig(),
            CubicSchedule(final_sparsity=0.5, start_step=1, num_steps=2),
        ),
        "pattern '2:4' here removes a fixed number": (
            PruneConfig(score="W", pattern="2:4"),
            CubicSchedule(final_sparsity=0.5, start_step=1, num_steps=2),
        ),
        "with one pruning, found 2": (
            [PruneConfig(score="W")] * 2,
            CubicSchedule(final_sparsity=0.5, start_step=1, num_steps=2),
        ),
    }
    for words, (prune, at) in refused.items():
        with pytest.raises(ConfigError, match=words):
            DSEECallback(prune, at)
    for wrong in ("2:4", {"sparsity": 0.5}, [{"sparsity": 0.5}]):
        with pytest.raises(ConfigError, match=r"prune holds a (str|dict) .*, expected PruneConfig"):
            DSEECallback(wrong, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"at '0\.3' is neither"):
        DSEECallback(PruneConfig(), "0.3")  # type: ignore[arg-type]
    for number in (2.5, "8", 0, True):
        with pytest.raises(ConfigError, match="calibration_batches must be a whole number from 1 on"):
            DSEECallback(PruneConfig(), 2, calibration_batches=number)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="inject"):
        trainer_of(model_of(), tmp_path, DSEECallback())
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    with pytest.raises(ConfigError, match="so that it is retuned"):
        trainer_of(model, tmp_path, DSEECallback(PruneConfig(score="W"), 6)).train()
    for impossible, words in (
        (dict(modules=("absent",)), "absent"),
        (dict(pattern="heads", num_per_layer=9), "heads"),
    ):
        late = trainer_of(model, tmp_path, DSEECallback(PruneConfig(score="W", **impossible), 3))
        with pytest.raises((ConfigError, TargetError), match=words):
            late.train()
        assert late.state.global_step == 0
    late = trainer_of(model, tmp_path, DSEECallback())
    late.add_callback(DSEECallback(PruneConfig(score="W"), 3))
    with pytest.raises(ConfigError, match="finished Trainer"):
        late.train()


def test_no_training_begins_anew_on_what_it_has_refitted(tmp_path):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    with pytest.raises(ConfigError, match="auto_find_batch_size starts the training again"):
        trainer_of(model, tmp_path / "a", DSEECallback(PruneConfig(score="W"), 3), auto_find_batch_size=True)
    trainer_of(model, tmp_path / "a", DSEECallback(), auto_find_batch_size=True)
    trainer = trainer_of(model, tmp_path / "b", DSEECallback(PruneConfig(), 3))
    trainer.train()
    before = [flat.clone() for flat in flats(model)]
    with pytest.raises(
        ConfigError, match="has pruned and re-fitted already; train on with a Trainer that has a new"
    ):
        trainer.train()
    assert all(map(torch.equal, before, flats(model)))
    trainer_of(model, tmp_path / "c", DSEECallback(PruneConfig(score="W", sparsity=0.7), 3)).train()
    assert zeros(model) > 0.69 * total(model)


def test_a_frozen_adapter_is_not_waited_for(tmp_path):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    frozen = model.model.layers[0].self_attn.q_proj.dsee_flat.requires_grad_(False)
    before = frozen.clone()
    trainer_of(model, tmp_path, DSEECallback()).train()
    assert torch.equal(frozen, before)


def test_a_training_that_ends_before_its_pruning_is_no_success(tmp_path):
    class Stops(DSEECallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = True

    model = model_of()
    dsee_scale.inject(model, CONFIG)
    with pytest.raises(RunError, match="before the pruning at step 3"):
        trainer_of(model, tmp_path, Stops(PruneConfig(score="W"), 0.5)).train()
