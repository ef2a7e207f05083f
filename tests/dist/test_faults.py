"""Runs that die, are told to stop, stop learning, or find damaged files: nothing is lost but time.

Real launches of `launch/finetune.py` on two ranks under ZeRO-3, hit by real signals. `DSEE_SCALE_FAULTS=100`
kills at as many random moments (the same ones each time) as it says.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging.handlers
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer

import dsee_scale
from dsee_scale import DSEECallback
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.errors import ConfigError, FormatError, RunError
from dsee_scale.training import start
from dsee_scale.training.survival import check_trained_values, limited_waiting, newest_first
from tests.dist import test_checkpoint
from tests.dist.fresh_ranks import Fault, launch, logs
from tests.dist.run_inputs import losses, tiny_recipe
from tests.models import build, llama_config, token_batch

pytestmark = pytest.mark.timeout(900)
RELAUNCH = 75
KILLS = int(os.environ.get("DSEE_SCALE_FAULTS", "20"))
PRUNED, STEPS = 14, 24
"""The steps of the run that is killed again and again: when it is pruned, and when it ends."""


def random_kill(rng: random.Random, step: int) -> Fault:
    """A moment that a run comes to which goes on from this step (0: from the beginning): where, when, which rank."""
    left = STEPS - step
    places = ["load"] if left < 3 else ["load", "step", "step", "save", "settle", "commit"]
    places += ["decompose"] * 2 if step == 0 else []
    places += ["prune"] * 4 if PRUNED - 2 <= step <= PRUNED else []
    place = rng.choice(places)
    saves = min(2, left // 2)
    calls = {"step": min(5, left), "save": saves, "settle": 2 * saves, "commit": saves, "decompose": 2}
    return Fault(place, 1 + rng.randrange(calls.get(place, 1)), rng.random() * 0.06, rank=rng.randrange(2))


def write_recipe(inputs: Path, folder: Path, **changes: Any) -> Path:
    """A recipe whose run leaves a checkpoint every second step."""
    changes = {"training__save_steps": 2, "export": None, "training__ddp_timeout": 100, **changes}
    values = tiny_recipe(inputs, folder / "run", **changes)
    path = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(inputs, folder)
    assert launch(recipe) == [0, 0], logs(recipe)
    return folder / "run"


def outcome(run: Path) -> tuple[dict[int, float], dict[str, bytes]]:
    """Losses of all steps, and the bytes of adapters and masks."""
    adapter = {path.name: path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))}
    assert set(adapter) == {"dsee_adapter.safetensors", "dsee_masks.safetensors"}
    return losses(run), adapter


def test_twenty_random_kills_of_a_rank_cost_nothing_but_time(inputs, tmp_path):
    """One run, killed and resumed again and again, ends with the bytes of one that was left alone."""
    lengths: dict[str, Any] = {"training__max_steps": PRUNED, "retune": {"max_steps": STEPS - PRUNED}}
    alone, killed = (write_recipe(inputs, tmp_path / name, **lengths) for name in ("alone", "killed"))
    assert launch(alone) == [0, 0], logs(alone)
    run, rng, places = killed.parent / "run", random.Random(0), set()
    for _ in range(KILLS):
        found = newest_first(run) if run.exists() else []
        fault = random_kill(rng, int(found[0].name.split("-")[1]) if found else 0)
        codes = launch(killed, "--resume", "auto", fault=fault)
        assert codes[fault.rank] == -signal.SIGKILL, f"{fault}\n{logs(killed)}"
        assert codes[1 - fault.rank] == RELAUNCH, f"{fault}\n{logs(killed)}"
        said = Path(f"{killed}.log.{1 - fault.rank}").read_text()
        assert f"rank {1 - fault.rank} lost another rank during" in said
        places.add(fault.place)
    assert KILLS < 20 or places == {"load", "decompose", "step", "save", "settle", "commit", "prune"}
    assert launch(killed, "--resume") == [0, 0], logs(killed)
    assert outcome(run) == outcome(alone.parent / "run")


def test_sigterm_to_one_rank_saves_on_all_and_leaves_with_a_code_of_its_own(inputs, undisturbed, tmp_path):
    """It comes twice where a whole group gets it and the launcher passes it on."""
    recipe = write_recipe(inputs, tmp_path)
    codes = launch(recipe, fault=Fault("step", 5, signal=signal.SIGTERM, times=2))
    assert codes == [RELAUNCH, RELAUNCH], logs(recipe)
    saved = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved >= 5
    for rank in range(2):
        assert f"saved at step {saved} of 11" in Path(f"{recipe}.log.{rank}").read_text()
    assert launch(recipe, "--resume") == [0, 0], logs(recipe)
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_a_rank_that_hangs_is_named_with_the_phase_once_the_timeout_is_over(inputs, tmp_path):
    recipe = write_recipe(inputs, tmp_path, training__ddp_timeout=10)
    codes = launch(recipe, fault=Fault("step", 8, signal=signal.SIGSTOP))
    assert codes[0] == RELAUNCH, logs(recipe)
    said = Path(f"{recipe}.log.0").read_text()
    assert "rank 0 lost another rank during 'retune, step" in said
    assert "ddp_timeout (10 s)" in said


@dataclasses.dataclass(frozen=True)
class ToTheGroup(Fault):
    """What torchrun does: the rank's process group gets the signal, its data loader's workers too."""

    def install(self) -> None:
        os.setpgid(0, 0)
        super().install()

    def _send(self) -> None:
        # From a stranger: workers take their parent's SIGTERM as their regular end.
        subprocess.run(["kill", f"-{int(self.signal)}", "--", f"-{os.getpid()}"], start_new_session=True)


def test_sigterm_leaves_the_data_loaders_workers_at_work_until_the_step_is_saved(inputs, tmp_path):
    recipe = write_recipe(
        inputs,
        tmp_path,
        training__dataloader_num_workers=1,
        training__dataloader_multiprocessing_context="fork",
    )
    codes = launch(recipe, fault=ToTheGroup("step", 2, signal=signal.SIGTERM))
    assert codes == [RELAUNCH, RELAUNCH], logs(recipe)
    assert "saved at step" in Path(f"{recipe}.log.1").read_text()


class FailsInside(Fault):
    """Calibration fails on this rank inside the model, between two blocks."""

    def install(self) -> None:
        from dsee_scale.passes import calibrate

        def run_model(model: Any, *args: Any, **kwargs: Any) -> None:
            def fail(*_: Any) -> None:
                raise ValueError("a kernel that is not there")

            model.module.model.layers[1].register_forward_pre_hook(fail)
            original(model, *args, **kwargs)

        original, calibrate.run_model = calibrate.run_model, run_model


def test_a_rank_that_fails_inside_the_model_ends_the_run_on_all_of_them(inputs, tmp_path):
    """Nobody can tell before, and under ZeRO-3 the other is in a collective: until this process ends, not for ever."""
    recipe = write_recipe(inputs, tmp_path, prune={"refit": False, "sparsity": 0.5}, training__max_steps=2)
    codes = launch(recipe, fault=FailsInside("", 0, rank=0), seconds=90)
    said = [Path(f"{recipe}.log.{rank}").read_text() for rank in range(2)]
    assert codes == [2, RELAUNCH], logs(recipe)
    assert "rank 0 does not run through the model: ValueError: a kernel that is not there" in said[0]
    assert "rank 1 lost another rank during 'prune" in said[1]
    assert "Traceback" not in "".join(said) and (tmp_path / "run" / "checkpoint-2").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_checkpoints(inputs, tmp_path):
    recipe = write_recipe(inputs, tmp_path, retune={"max_steps": 6, "learning_rate": 9e17})
    assert launch(recipe) == [2, 2], logs(recipe)
    assert "RunError" in logs(recipe)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    # The rate was that high from step 8 on, whose own loss was still a number.
    assert kept == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    flags = ["--resume", str(tmp_path / "run" / "checkpoint-6"), "--retune.learning_rate", "1e-3"]
    assert launch(recipe, *flags) == [0, 0], logs(recipe)
    assert all(loss == loss for loss in losses(tmp_path / "run").values())


def test_damaged_checkpoints_are_passed_over_aloud(inputs, undisturbed, tmp_path):
    """The newest has half a manifest, the one before it a flipped bit that only a hash can show."""
    recipe = write_recipe(inputs, tmp_path)
    for step in (4, 6, 8):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    manifest = tmp_path / "run" / "checkpoint-8" / "dsee_manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])
    moments = tmp_path / "run" / "checkpoint-6" / "dsee_optimizer-00002-of-00002.safetensors"
    data = bytearray(moments.read_bytes())
    data[-100] ^= 16
    moments.write_bytes(data)
    assert launch(recipe, "--resume") == [0, 0], logs(recipe)
    said = Path(f"{recipe}.log.0").read_text()
    for step, file in ((8, manifest), (6, moments)):
        assert f"checkpoint-{step} cannot be used" in said and f"{file.name} is damaged" in said
    assert "checkpoint-4" in said.split("going on from")[1].splitlines()[0]
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_without_a_whole_checkpoint_nothing_is_started_over_in_silence(inputs, undisturbed, tmp_path):
    recipe = write_recipe(inputs, tmp_path)
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "dsee_state.json").unlink()
    assert launch(recipe, "--resume", "auto") == [2, 2], logs(recipe)
    assert "no checkpoint in" in logs(recipe) and "dsee_state.json is missing" in logs(recipe)


def save_on_a_full_disk(folder: str, limit: int | None) -> str:
    """Save and save again where files may not grow beyond a limit; the error of the second save."""
    model = test_checkpoint.base_model("llama", "zero3", torch.float32)
    dsee_scale.inject(model, test_checkpoint.FAMILIES["llama"][1])
    engine = test_checkpoint.engine_for(model, "zero3", torch.float32)
    test_checkpoint.train(engine, range(1))
    save_training_state(engine, folder, extra={"step": 1})
    test_checkpoint.train(engine, range(1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit is not None and torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save_training_state(engine, folder, extra={"step": 2}, overwrite=True)
    except FormatError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    return str(load_training_state(engine, folder)["step"])


def test_a_disk_that_fills_up_during_a_save_leaves_the_checkpoint_before_whole(pools, tmp_path):
    """The operating system refuses the write on one rank; every rank raises the same error."""
    folder = tmp_path / "state"
    assert pools(2).run(save_on_a_full_disk, str(folder), None) == ["2", "2"]
    shutil.rmtree(folder)
    found = pools(2).run(save_on_a_full_disk, str(folder), 4096)
    assert found[0] == found[1] and "File too large" in found[0]
    assert json.loads((folder / "dsee_state.json").read_text())["extra"] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    stored = open_folder(folder, ("training_state",))
    stored.verify(sorted(stored.files))


def hold(output: str) -> str:
    """Hold a folder whose holder elsewhere must be silent for longer than a collective may wait; the refusal."""
    limits = {"SILENCE": 4.0, "LOOK": 0.1}
    before = {name: getattr(start, name) for name in limits}
    vars(start).update(limits)
    try:
        with limited_waiting(2), start.locked(Path(output)):
            return ""
    except ConfigError as error:
        return str(error)
    finally:
        vars(start).update(before)
        with limited_waiting(1800):  # the pool's own
            pass


def test_a_restart_on_another_host_waits_on_all_ranks_until_the_lost_one_is_known_to_be_gone(pools, tmp_path):
    assert pools(2).run(hold, str(tmp_path / "new")) == ["", ""]  # and the pool is up
    lock = tmp_path / "run" / start.LOCK_FILE
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "x", "since": "noon"}))
    assert pools(2).run(hold, str(tmp_path / "run")) == ["", ""]
    assert not lock.exists()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "x", "since": "noon"}))
    beat = threading.Timer(1.5, os.utime, (lock,))
    beat.start()
    said = set(pools(2).run(hold, str(tmp_path / "run")))
    beat.join()
    assert len(said) == 1 and "process 1 on elsewhere, since noon" in said.pop() and lock.exists()


def train_where_a_folder_stays(base: str, output: str) -> list[str]:
    """A stock Trainer that keeps one checkpoint; the storage lets rank 0 delete the first at the third try alone."""
    from dsee_scale.training import survival
    from dsee_scale.training.setup import kept_environment, make_arguments

    tries, said = [], logging.handlers.BufferingHandler(100)

    def busy(folder: Path) -> None:
        tries.append(folder)
        if folder.name == "checkpoint-1" and len(tries) < 4:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        shutil.rmtree(folder)

    settings = dict(
        output_dir=output, max_steps=4, save_steps=1, save_total_limit=1, per_device_train_batch_size=2
    )
    settings |= dict(report_to="none", disable_tqdm=True, deepspeed="zero3_cpu")
    survival.logger.addHandler(said)
    survival.shutil = SimpleNamespace(rmtree=busy)  # type: ignore[assignment]
    try:
        with kept_environment():
            args = make_arguments(settings)
            model = AutoModelForCausalLM.from_pretrained(base)
            dsee_scale.inject(model, test_checkpoint.FAMILIES["llama"][1])
            rows = [{"input_ids": row, "labels": row} for row in token_batch(batch=16, length=10)]
            Trainer(model, args, train_dataset=rows, callbacks=[DSEECallback()]).train()
    finally:
        survival.shutil = shutil  # type: ignore[assignment]
        survival.logger.removeHandler(said)
    return [record.getMessage() for record in said.buffer]


def test_an_old_checkpoint_that_cannot_be_deleted_is_said_once_and_tried_again(pools, tmp_path):
    """Rank 0 deletes, while the others are in the next step."""
    build(llama_config()).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    output = tmp_path / "run"
    said, others = pools(2).run(train_where_a_folder_stays, str(tmp_path / "base"), str(output))
    assert others == [] and len(said) == 1
    assert "checkpoint-1 is kept in spite of save_total_limit" in said[0] and "Directory not empty" in said[0]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]


def test_parameters_that_are_no_numbers_are_not_saved():
    """DeepSpeed skips a step whose gradient is no number; a plain optimizer makes it, and the loss tells later."""
    model = build(llama_config())
    dsee_scale.inject(model, test_checkpoint.FAMILIES["llama"][1])
    parameters = dsee_scale.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters)
    check_trained_values(model)
    (model(token_batch(), labels=token_batch()).loss * float("nan")).backward()
    optimizer.step()
    with pytest.raises(RunError, match="holds values that are not finite"):
        check_trained_values(model)
