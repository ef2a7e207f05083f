"""What `report_to` shows while a run goes on: the loss, each phase's quality, and how much is zero."""

from __future__ import annotations

import json

import pytest

from tests.dist.run_inputs import write_inputs
from tests.unit.test_run_promises import launch, plain

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_shows_loss_phases_and_sparsity(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    output = tmp_path / "run"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    launch(plain(tmp_path, output, training__report_to="tensorboard", training__logging_steps=1, export=None))
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    metrics = json.loads((output / "metrics.json").read_text())

    def shows(tag: str, expected: list[tuple[int, float]]) -> None:
        found = events.Scalars(tag)
        assert [event.step for event in found] == [step for step, _ in expected]
        assert [event.value for event in found] == pytest.approx([value for _, value in expected], abs=1e-4)

    assert [entry["step"] for entry in metrics["training"]] == list(range(1, 12))
    shows("train/loss", [(entry["step"], entry["loss"]) for entry in metrics["training"]])
    phases = {phase["phase"]: phase for phase in metrics["phases"]}
    assert list(phases) == ["before", "tuned", "pruned", "retuned"]
    assert phases["retuned"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    shows("train/sparsity", [(phase["step"], phase["sparsity"]) for phase in phases.values()])
    for name, phase in phases.items():
        for metric in ("loss", "accuracy"):
            shows(f"train/{name}_{metric}", [(phase["step"], phase["quality"][metric])])
