"""A run that ends well has trained and pruned all that was planned; one that can't is refused before its first step."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from dsee_scale import distributed
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.errors import ConfigError, DSEEError, FormatError, RunError, RunStoppedError
from dsee_scale.evaluation import export_check, stock_check
from dsee_scale.recipe.recipe import build_recipe
from dsee_scale.training import start
from dsee_scale.training import trainer as training
from dsee_scale.training.base_trainer import AdapterTrainer
from dsee_scale.training.run import run
from dsee_scale.training.timeline import Phase, PruneEvent, Timeline
from tests.dist.run_inputs import tiny_recipe, write_inputs, zero_share
from tests.models import build, gpt2_config

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


def refusal(values: dict[str, Any], kind: type[DSEEError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        launch(values)
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    launch(plain(inputs, output))
    return output


def resumed_from(finished: Path, step: int, output: Path) -> None:
    shutil.copytree(finished / f"checkpoint-{step}", output / f"checkpoint-{step}")


def test_the_exports_card_shows_the_run(finished):
    card = (finished / "model" / "README.md").read_text()
    assert "| retuned " in card and "![accuracy at each phase](dsee_quality.png)" in card
    assert (finished / "model" / "dsee_quality.png").read_bytes().startswith(b"\x89PNG")


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


def test_a_run_that_is_told_to_stop_leaves_with_a_whole_checkpoint_and_nothing_half_done(
    inputs, tmp_path, monkeypatch
):
    """The checkpoint of the step before is finished by then; the last one is waited for."""
    real, steps = AdapterTrainer.training_step, []

    def told(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", told)
    with pytest.raises(RunStoppedError, match="saved at step 3 of 11"):
        launch(plain(inputs, tmp_path / "run", training__save_steps=2))
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-2", "checkpoint-3"]
    for folder in saved:
        open_folder(folder, ("training_state",)).verify_all()
    assert not list((tmp_path / "run").glob(".*.partial"))


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
    phase = Phase(name="tune", start=0, stop=5)
    event = PruneEvent(step=3, configs=())
    timeline = Timeline(phases=(phase,), prune_events=(event,), schedules=())
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


def files(folder: Path) -> list[str]:
    return (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []
    )


POOL = {"name": "a", "sparsity": 0.5}
LATE = [
    ({"prune": {"score": "W", "modules": ["nope"]}}, "'nope' matches no linear layer"),
    (
        {"prune": {"score": "W", "pools": [{**POOL, "modules": ["nope"]}]}},
        "pool 'a': modules 'nope' matches no weight",
    ),
    ({"prune": {"score": "W", "pools": [POOL, {**POOL, "name": "b"}]}}, "pools 'a' and 'b' both hold"),
    ({"prune": {"score": "W", "pattern": "3:7"}}, "7"),
    ({"prune": {"pattern": "heads", "num_per_layer": 9, "score": "ABS"}}, "heads"),
    ({"prune": {"pattern": "neurons", "num_per_layer": 99, "score": "ABS"}}, "neurons"),
    ({"prune": [{"score": "W"}, {"score": "W", "modules": ["nope"]}]}, "'nope' matches no linear layer"),
    ({"prune": {}, "model__quantization": {"load_in_4bit": True}}, "is quantised, and re-fitted values"),
    ({"dsee__trained_modules": ["o_proj"]}, "trained, so its zeros would not stay"),
    ({"dsee__target_modules": ["nope"]}, "nope"),
    ({"training__report_to": "nothing_like_it"}, "nothing_like_it"),
    ({"training__optim": "galore_adamw"}, "galore"),
    ({"training__deepspeed": {"zero_optimization": {"stage": 9}}}, "stage is 9"),
    ({"training__deepspeed": {"zero_optimization": {"stage": 0}}}, "stage is 0"),
    ({"training__deepspeed": {"zero_optimization": [3]}}, "expected a section"),
    (
        {"training__deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}},
        "reduce_bucket_size",
    ),
    ({"training__deepspeed": {"zero_optimization": {"stage": 3, "stge": 1}}}, "stge"),
    ({"training__per_device_train_batch_size": 10**6}, "no step would be made"),
    ({"data__generate_samples": 3}, "generate_samples goes with"),
    (
        {"prune": None, "retune": None, "gradual": {"num_steps": 2}},
        "gradual: a schedule goes with one pruning, found 0",
    ),
    (
        {"prune": {"score": "W", "pattern": "2:4"}, "gradual": {"num_steps": 2}},
        "gradual: a schedule raises a sparsity",
    ),
]


@pytest.mark.parametrize(("changes", "message"), LATE, ids=[message for _, message in LATE])
def test_what_would_fail_after_the_tune_phase_is_refused_before_it(
    inputs, tmp_path, monkeypatch, changes, message
):
    """And nothing of the refused start is left behind, so that the next one is not refused for it."""
    monkeypatch.setattr(training.DSEETrainer, "training_step", lambda *_: pytest.fail("a step was made"))
    said = refusal(plain(inputs, tmp_path / "run", **changes), DSEEError)
    assert message in said and "\n" not in said
    assert files(tmp_path / "run") in ([], ["recipe.yaml"])


def test_examples_longer_than_learned_positions_are_refused_before_the_first(inputs, tmp_path):
    size = len(AutoTokenizer.from_pretrained(inputs / "model"))
    config = gpt2_config(vocab_size=size, n_positions=16, eos_token_id=1, bos_token_id=1)
    build(config).save_pretrained(tmp_path / "gpt2")
    settings = {"model": {"name": str(tmp_path / "gpt2"), "tokenizer": str(inputs / "model")}, "export": None}
    settings |= {"dsee": {"rank": 2, "num_sparse": 4, "target_modules": ["c_attn"]}}
    values = plain(inputs, tmp_path / "run", **settings)
    expected = "has positions for 16 tokens: set data.max_length to at most 16"
    assert expected in refusal(values)


def damaged_model(inputs: Path, tmp_path: Path, change: str) -> Path:
    model = Path(shutil.copytree(inputs / "model", tmp_path / "model"))
    weights = model / "model.safetensors"
    if change == "no weights":
        weights.unlink()
    elif change == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == "header":
        weights.write_bytes(b"\xff" * 100)
    elif change == "outside":
        shutil.move(weights, tmp_path / "secret.safetensors")
        index = {"weight_map": {"x": "../secret.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif change == "config":
        (model / "config.json").write_text("[" * 100_000)
    elif change == "no folder":
        shutil.rmtree(model)
    return model


@pytest.mark.parametrize("change", ["no weights", "cut short", "header", "outside", "config", "no folder"])
def test_a_model_that_does_not_load_is_one_line(inputs, tmp_path, change):
    values = plain(inputs, tmp_path / "run", model={"name": str(damaged_model(inputs, tmp_path, change))})
    assert "\n" not in refusal(values, DSEEError) and files(tmp_path / "run") == []


@pytest.mark.parametrize("output", ["/proc/x", "/dev/null", "/dev/null/x", "a" * 300, "a\0b"])
def test_an_impossible_output_folder_is_one_line(inputs, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    assert "\n" not in refusal(plain(inputs, Path(output)))


def test_two_runs_in_one_folder_are_refused_and_dead_ones_are_passed_over(inputs, tmp_path):
    import subprocess
    import sys

    output = tmp_path / "run"
    values = plain(inputs, output, data__train_file="nowhere.csv")
    program = (
        "import sys, time; from pathlib import Path; from dsee_scale.training.start import locked\n"
        f"with locked(Path({str(output)!r})):\n    print('held', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and "held" in other.stdout.readline()
        assert f"process {other.pid} on" in refusal(values)
        other.kill()
    assert (output / start.LOCK_FILE).exists()
    assert "nowhere.csv does not exist" in refusal(values)
    assert not (output / start.LOCK_FILE).exists()
    (output / start.LOCK_FILE).write_text("{")
    assert "nowhere.csv does not exist" in refusal(values)


def test_a_run_on_another_machine_is_told_from_a_dead_one_by_its_next_sign_of_life(
    inputs, tmp_path, monkeypatch, caplog
):
    """A restart on another host, soon after the first was lost, waits instead of giving up."""
    lock = tmp_path / "run" / start.LOCK_FILE
    values = plain(inputs, tmp_path / "run", data__train_file="nowhere.csv")

    def leave(age: float) -> None:
        lock.parent.mkdir(exist_ok=True)
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "x", "since": "noon"}))
        os.utime(lock, (time.time() - age,) * 2)

    monkeypatch.setattr(start, "LOOK", 0.05)
    leave(start.SILENCE + 60)
    assert "nowhere.csv does not exist" in refusal(values) and "elsewhere" not in caplog.text
    leave(10)
    beat = threading.Timer(1, os.utime, (lock,))
    beat.start()
    assert "process 1 on elsewhere, since noon" in refusal(values)
    beat.join()
    assert lock.exists()
    beat = threading.Timer(1, lock.unlink)  # it ends
    beat.start()
    assert "nowhere.csv does not exist" in refusal(values)
    for age, silence in ((10, 12), (-1000, 1)):  # and by a clock that was wrong
        monkeypatch.setattr(start, "SILENCE", silence)
        leave(age)
        began = time.monotonic()
        assert "nowhere.csv does not exist" in refusal(values)
        assert time.monotonic() - began > 0.9
    assert "process 1 on elsewhere" in caplog.text and "waiting" in caplog.text


def test_a_run_in_another_container_of_the_same_name_is_not_taken_for_dead(inputs, tmp_path, monkeypatch):
    """With the host's network a container has the host's name, and no container sees another one's processes."""
    lock = tmp_path / "run" / start.LOCK_FILE
    lock.parent.mkdir()
    holder = {"host": socket.gethostname(), "pid": 2**30, "start": "x", "machine": "its own", "since": "noon"}
    lock.write_text(json.dumps(holder))
    monkeypatch.setattr(start, "LOOK", 0.05)
    beat = threading.Timer(1, os.utime, (lock,))
    beat.start()
    assert f"process {2**30} on {socket.gethostname()}" in refusal(plain(inputs, tmp_path / "run"))
    beat.join()
    assert lock.exists()


def test_a_failed_start_does_not_block_its_retry_and_what_is_anothers_does(inputs, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.DSEETrainer, "train", lambda *_, **__: 1 / 0)
        assert "ZeroDivisionError" in refusal(plain(inputs, output))
    assert files(output) == ["recipe.yaml"]
    (output / "notes.txt").write_text("mine")
    assert "is not empty (notes.txt)" in refusal(plain(inputs, output))
    (output / "notes.txt").unlink()
    (output / "recipe.yaml").write_text("mine")
    assert "is not empty (recipe.yaml)" in refusal(plain(inputs, output))
    assert "was not written by a run" in refusal(
        plain(inputs, output, training__resume_from_checkpoint="auto")
    )
    assert (output / "recipe.yaml").read_text() == "mine"


def test_a_check_of_the_export_loses_nothing_however_it_ends(inputs, tmp_path, monkeypatch, caplog):
    """It fails; it takes long, while the ranks meet; there is no memory for it. Numbers are there before."""

    def phases() -> list[str]:
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        return [phase["phase"] for phase in metrics["phases"]]

    short = {"training__max_steps": 1, "prune": None, "retune": None, "export": {"delta": "masked"}}
    values = plain(inputs, tmp_path / "run", **short)
    program, original = tmp_path / "program.py", Path(stock_check.__file__).read_text()
    monkeypatch.setattr(stock_check, "__file__", str(program))
    program.write_text("raise SystemExit('no such class')")
    assert "no such class" in refusal(values, FormatError)
    for name in ("metrics.json", "report.html", "adapter/dsee_manifest.json", "model/config.json"):
        assert (tmp_path / "run" / name).exists()

    met = []
    real = distributed.max_over_ranks
    monkeypatch.setattr(distributed, "MEETING", 0.2)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda *a, **k: met.append(a) or real(*a, **k))
    program.write_text(f"import time\ntime.sleep(1)\n{original}")
    values["training"]["resume_from_checkpoint"] = True
    launch(values)
    assert len(met) > 3 and [flag for (flag,) in met] == [1] * (len(met) - 1) + [0]
    assert "exported" in phases()

    full = SimpleNamespace(available=1 << 29)
    monkeypatch.setattr(export_check.psutil, "virtual_memory", lambda: full)
    launch(values)
    assert "was not checked: it needs more memory" in caplog.text
    assert "tuned" in phases() and "exported" not in phases()
