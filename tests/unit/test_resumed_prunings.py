"""A training that is resumed with another length or other prunings is neither left dense nor pruned twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dsee_scale
from dsee_scale import CubicSchedule, DSEECallback, PruneConfig
from dsee_scale.checkpoint.files import MANIFEST, sha256
from dsee_scale.checkpoint.training_state import STATE_FILE
from dsee_scale.errors import ConfigError
from tests.unit.test_trainer_callback import CONFIG, model_of, total, trainer_of, zeros

PRUNE = PruneConfig(score="W")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 to 8; pruned at step 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer_of(model, folder, DSEECallback(PRUNE, 0.5), max_steps=8).train()
    return folder


def resumed(
    finished: Path, run: Path, step: int, callback: DSEECallback, *, told: bool, **changes: Any
) -> Any:
    """The model, trained on from a checkpoint; `told`: the checkpoint says what its training had planned."""
    shutil.copytree(finished, run)
    checkpoint = run / f"checkpoint-{step}"
    if not told:
        forget(checkpoint)
    model = model_of()
    dsee_scale.load_adapter(model, checkpoint)
    trainer_of(model, run, callback, **changes).train(resume_from_checkpoint=str(checkpoint))
    return model


def forget(checkpoint: Path) -> None:
    """As a version before this one would have saved it."""
    path = checkpoint / STATE_FILE
    record = json.loads(path.read_text())
    record["extra"].pop("planned", None)
    path.write_text(json.dumps(record))
    manifest = checkpoint / MANIFEST
    values = json.loads(manifest.read_text())
    values["files"][STATE_FILE] |= {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest.write_text(json.dumps(values))


REFUSED = {
    "shorter": (2, DSEECallback(PRUNE, 0.25), 8, "was pruned never; by .* pruned at step 2"),
    "longer": (6, DSEECallback(PRUNE, 0.5), 16, "was pruned at step 4; by .* pruned never"),
    "other steps": (6, DSEECallback(PRUNE, 5), 8, "was pruned at step 4; by .* pruned at step 5"),
    "other settings": (
        6,
        DSEECallback(PruneConfig(score="W", sparsity=0.7), 4),
        8,
        "was pruned at step 4; .* other settings",
    ),
    "no pruning": (6, DSEECallback(), 8, "was pruned at step 4; by .* pruned never"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_plan_by_which_the_checkpoint_would_be_another_is_refused(finished, tmp_path, name):
    step, callback, steps, words = REFUSED[name]
    with pytest.raises(ConfigError, match=f"checkpoint-{step} is at step {step} and {words}"):
        resumed(finished, tmp_path / "run", step, callback, told=True, max_steps=steps)
    assert {each.name for each in (tmp_path / "run").iterdir()} == {each.name for each in finished.iterdir()}


@pytest.mark.parametrize("name", ["shorter", "longer"])
def test_a_checkpoint_that_does_not_tell_its_plan_is_judged_by_its_model(finished, tmp_path, name):
    step, callback, steps, _ = REFUSED[name]
    words = {"shorter": "was pruned never; by", "longer": "was pruned at a step that it does not tell; by"}
    with pytest.raises(ConfigError, match=words[name]):
        resumed(finished, tmp_path / "run", step, callback, told=False, max_steps=steps)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("step", "at", "steps"), [(2, 0.5, 12), (6, 4, 10), (2, 3, 8)])
def test_what_is_still_to_come_may_change(finished, tmp_path, step, at, steps, told):
    model = resumed(finished, tmp_path / "run", step, DSEECallback(PRUNE, at), told=told, max_steps=steps)
    assert zeros(model) == round(total(model) / 2)


def test_a_schedule_knows_its_steps(tmp_path):
    def schedule(start: int) -> DSEECallback:
        return DSEECallback(PRUNE, CubicSchedule(final_sparsity=0.5, start_step=start, num_steps=4, every=2))

    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer_of(model, tmp_path / "first", schedule(1), max_steps=6, save_steps=4).train()
    with pytest.raises(ConfigError, match=r"was pruned at step 1, 3; by .* pruned at step 2, 4"):
        resumed(tmp_path / "first", tmp_path / "run", 4, schedule(2), told=True, max_steps=8)
    resumed(tmp_path / "first", tmp_path / "again", 4, schedule(1), told=True, max_steps=8)
