"""Which folders of a run count as its checkpoints, and which stay when an older one is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import CubicSchedule, DSEECallback, PruneConfig
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.errors import ConfigError
from dsee_scale.training.survival import newest_first
from tests.unit.test_trainer_callback import CONFIG, model_of, trainer_of
from tests.unit.test_unfinished_checkpoints import Told


def test_checkpoints_are_found_by_step_and_copies_of_them_are_not(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-10-backup", "checkpoint-best", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-20").write_text("no folder")
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-10", "checkpoint-5"]


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer_of(model, folder, DSEECallback(), save_steps=1, max_steps=4).train()
    return folder


@pytest.mark.parametrize("kept", [False, True], ids=["in the output folder", "kept elsewhere"])
def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_its_own_and_loses_no_later_one(
    finished, tmp_path, caplog, kept
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "abandoned-checkpoint-4").mkdir()
    source = run / "checkpoint-2"
    if kept:
        source = Path(shutil.move(source, tmp_path / "kept"))
    model = model_of()
    dsee_scale.load_adapter(model, source)
    trainer = trainer_of(model, run, DSEECallback(), save_steps=1, max_steps=5, save_total_limit=1)
    seen = Told(run)
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=str(source))
    assert seen.found == [["3"], ["4"], ["5"]]
    aside = ["abandoned-checkpoint-3", "abandoned-checkpoint-4", "abandoned-checkpoint-4-2"]
    assert folders(run) == [*aside, "checkpoint-5"]
    for name in (aside[0], aside[2]):
        open_folder(run / name, ("training_state",)).verify_all()
    assert "abandoned-checkpoint-4-2" in caplog.text


def test_a_resume_that_is_refused_renames_nothing(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    model = model_of()
    dsee_scale.load_adapter(model, run / "checkpoint-2")
    trainer = trainer_of(model, run, DSEECallback(), max_steps=5)
    trainer.optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model))
    trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    trainer.lr_scheduler.rule = abs  # no checkpoint can hold it
    before = folders(run)
    with pytest.raises(ConfigError, match="lr_scheduler ExponentialLR"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert folders(run) == before


def test_a_training_from_the_start_deletes_no_later_checkpoint_and_none_of_its_own_last(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-4", run / "checkpoint-4")
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer_of(model, run, DSEECallback(), save_steps=1, max_steps=3, save_total_limit=1).train()
    assert folders(run) == ["checkpoint-3", "checkpoint-4"]


def test_a_gradual_pruning_from_the_first_step_on_sees_the_same_batches_when_resumed(tmp_path):
    """Those that the pruning before the first step looks at are no inputs of the training yet."""
    schedule = CubicSchedule(final_sparsity=0.5, start_step=0, num_steps=4, every=4, initial_sparsity=0.2)
    seen: dict[str, list[list[Any]]] = {"straight": [], "resumed": []}

    def train(name: str, model: Any, checkpoint: str | None) -> None:
        callback = DSEECallback(PruneConfig(sparsity=0.5, refit=False), schedule)
        calibration = callback._calibration

        def noting() -> list[dict[str, torch.Tensor]]:
            found = calibration()
            seen[name].append([batch["input_ids"].tolist() for batch in found])
            return found

        callback._calibration = noting  # type: ignore[method-assign]
        trainer_of(model, tmp_path / "run", callback, max_steps=5).train(resume_from_checkpoint=checkpoint)

    model_of().save_pretrained(tmp_path / "published")
    model = model_of(tmp_path / "published")
    dsee_scale.inject(model, CONFIG)
    train("straight", model, None)
    again, checkpoint = model_of(tmp_path / "published"), tmp_path / "run" / "checkpoint-2"
    dsee_scale.load_adapter(again, checkpoint)
    train("resumed", again, str(checkpoint))
    assert [len(batches) for batches in seen["straight"]] == [6, 4]
    assert seen["resumed"] == seen["straight"][1:]


def test_the_scale_of_half_precision_gradients_is_that_of_the_checkpoint(tmp_path):
    def trainer(model: Any, steps: int) -> Any:
        made = trainer_of(model, tmp_path / "run", DSEECallback(), save_steps=2, max_steps=steps)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
        return made

    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer(model, 2).train()
    again = model_of()
    dsee_scale.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    resumed = trainer(again, 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.accelerator.scaler.get_scale() == 16.0 * 2**3
