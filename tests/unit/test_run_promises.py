"""A run that ends well has trained and pruned all that was planned; one that can't is refused before its first step."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsee_scale.errors import ConfigError, DSEEError, RunError
from dsee_scale.recipe.recipe import build_recipe
from dsee_scale.training import trainer as training
from dsee_scale.training.run import run
from dsee_scale.training.timeline import Phase, PruneEvent, Timeline
from tests.dist.run_inputs import tiny_recipe, write_inputs, zero_share

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def plain(inputs: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe in this one process: 6 + 5 steps of 12 examples, pruned to half after step 6."""
    usual = {
        "training__deepspeed": None,
        "training__per_device_train_batch_size": 12,
        "training__report_to": "none",
        "export": {"delta": "masked", "check": False},
    }
    return tiny_recipe(inputs, output, **{**usual, **changes})


def launch(values: dict[str, Any]) -> None:
    try:
        run(build_recipe(values))
    finally:
        gc.collect()


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        launch(values)
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    launch(plain(inputs, output))
    return output


def resumed_from(finished: Path, step: int, output: Path) -> None:
    shutil.copytree(finished / f"checkpoint-{step}", output / f"checkpoint-{step}")


def test_a_checkpoint_before_the_prune_and_one_at_the_end_whatever_save_strategy_says(
    inputs, tmp_path, monkeypatch
):
    """With save_strategy "no" one of them at a time; a prune that fails costs nothing but itself."""
    values = plain(inputs, tmp_path / "run", training__save_strategy="no")
    real = training.prune

    def failing(*_: Any) -> None:
        raise RunError("no room for the masks")

    monkeypatch.setattr(training, "prune", failing)
    with pytest.raises(RunError):
        launch(values)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    monkeypatch.setattr(training, "prune", real)
    values["training"]["resume_from_checkpoint"] = True
    launch(values)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-11"]
    zeros, entries = zero_share(tmp_path / "run" / "model")
    assert zeros == round(entries / 2)


def test_a_run_resumed_between_checkpoint_and_prune_gives_the_same_bytes(finished, inputs, tmp_path):
    resumed_from(finished, 6, tmp_path / "run")
    launch(plain(inputs, tmp_path / "run", training__resume_from_checkpoint=True))
    for file in ("dsee_adapter.safetensors", "dsee_masks.safetensors"):
        assert (tmp_path / "run" / "adapter" / file).read_bytes() == (
            finished / "adapter" / file
        ).read_bytes()
    phases = [
        json.loads((folder / "metrics.json").read_text())["phases"] for folder in (finished, tmp_path / "run")
    ]
    assert [[p["phase"], p["zeros"], p["quality"]] for p in phases[0]] == [
        [p["phase"], p["zeros"], p["quality"]] for p in phases[1]
    ]


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (4, {"training__max_steps": 3, "retune": None}, "is at step 4, and this run ends at step 3"),
        (
            4,
            {"training__max_steps": 3},
            "was pruned never; by this recipe it would have been pruned at step 3",
        ),
        (
            8,
            {"training__max_steps": 9},
            "was pruned at step 6; by this recipe it would have been pruned never",
        ),
        (8, {"prune__sparsity": 0.25}, "at step 6, with other settings"),
        (8, {"prune": None, "retune": None, "training__max_steps": 11}, "was pruned at step 6"),
        (11, {"retune__max_steps": 4}, "is at step 11, and this run ends at step 10"),
    ],
)
def test_a_resume_past_a_prune_that_was_not_done_is_refused(
    finished, inputs, tmp_path, step, changes, message
):
    resumed_from(finished, step, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    values = plain(inputs, tmp_path / "run", training__resume_from_checkpoint="auto", **changes)
    assert message in refusal(values)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_rows_that_make_no_batch_are_refused(inputs, tmp_path):
    values = plain(inputs, tmp_path / "run", training__per_device_train_batch_size=61)
    assert "make 60 examples" in refusal(values)


def test_nothing_is_exported_unless_every_step_and_prune_was_done(inputs, tmp_path, monkeypatch):
    """Whatever the reason why the Trainer came back early."""
    monkeypatch.setattr(training.PhaseCallback, "prune_if_due", lambda *_: None)
    with pytest.raises(RunError, match="was pruned never, while at step 6 was planned"):
        launch(plain(inputs, tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "model").exists()


def test_the_check_counts_steps_and_prunings():
    phase = Phase(
        name="tune", start=0, stop=5, learning_rate=1, warmup_steps=0, schedule="constant", schedule_kwargs={}
    )
    event = PruneEvent(step=3, configs=())
    timeline = Timeline(phases=(phase,), prune_events=(event,))
    timeline.check_finished(5, [event.to_dict()])
    for step, done in ((4, [event.to_dict()]), (5, []), (5, [event.to_dict()] * 2)):
        with pytest.raises(DSEEError):
            timeline.check_finished(step, done)
    timeline.check_resumed(3, [], "c")
    timeline.check_resumed(3, [event.to_dict()], "c")
    timeline.check_resumed(2, [], "c")
    for step, done in ((4, []), (6, [event.to_dict()]), (2, [event.to_dict()])):
        with pytest.raises(ConfigError):
            timeline.check_resumed(step, done, "c")
