"""What a checkpoint needs when training ends early, and what it brings back of the Trainer's callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

import dsee_scale
from dsee_scale import DSEECallback
from dsee_scale.checkpoint.folder import open_folder
from tests.unit.test_trainer_callback import CONFIG, model_of, trainer_of


class Stops(TrainerCallback):
    """Ends the training with its first epoch, or its only epoch early."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.what == "training"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = self.what == "epoch" and state.global_step == 4


@pytest.mark.parametrize(("what", "epochs", "step"), [("training", 2, 6), ("epoch", 1, 4)])
@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_checkpoint_of_the_step_that_training_ends_with_is_there(tmp_path, what, epochs, step, best):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    settings: dict[str, Any] = dict(
        max_steps=-1, num_train_epochs=epochs, save_steps=step, save_total_limit=1
    )
    if best:
        settings |= dict(eval_strategy="steps", eval_steps=step, load_best_model_at_end=True)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback(), **settings)
    trainer.add_callback(Stops(what))
    trainer.train()
    assert trainer.state.global_step == step
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"checkpoint-{step}"]
    open_folder(tmp_path / "run" / f"checkpoint-{step}", ("training_state",)).verify_all()


def test_callbacks_go_on_with_the_state_that_they_were_saved_in(tmp_path):
    """Of two of one kind each with its own, and what one saw is no news after many checkpoints."""

    def train(checkpoint: Path | None) -> Any:
        model = model_of()
        if checkpoint is None:
            dsee_scale.inject(model, CONFIG)
        else:
            dsee_scale.load_adapter(model, checkpoint)
        settings: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=8)
        settings |= dict(load_best_model_at_end=True, restore_callback_states_from_checkpoint=True)
        trainer = trainer_of(model, tmp_path / "run", DSEECallback(), **settings)
        for patience in (3, 6):
            trainer.add_callback(EarlyStoppingCallback(patience, early_stopping_threshold=9.0))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer.state

    straight = train(None)
    assert straight.global_step == 4
    saved = straight.stateful_callbacks["EarlyStoppingCallback"]
    assert [each["attributes"]["early_stopping_patience_counter"] for each in saved] == [3, 3]
    assert train(tmp_path / "run" / "checkpoint-3").global_step == 4


def test_the_adapter_stands_beside_the_checkpoints_however_the_output_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, Path("run"), DSEECallback(), max_steps=2)
    trainer.train()
    for name in (str(tmp_path / "run"), "run/", "../" + tmp_path.name + "/run"):
        trainer.save_model(name)
        open_folder(tmp_path / "run" / "adapter", ("adapter",)).verify_all()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "checkpoint-2"]
