"""Checkpoints that share their mask files, and that are finished while training goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import dsee_scale
from dsee_scale import DSEECallback, PruneConfig
from dsee_scale.checkpoint.adapter import load_adapter
from dsee_scale.checkpoint.folder import HashedFile, open_folder
from dsee_scale.checkpoint.masks import _spread
from dsee_scale.checkpoint.training_state import (
    load_training_state,
    save_training_state,
    start_training_state,
)
from dsee_scale.errors import FormatError
from dsee_scale.partition.port import Shard
from tests.models import build, llama_config
from tests.unit.test_adapter_files import LLAMA, tuned
from tests.unit.test_trainer_callback import CONFIG, model_of, trainer_of

MASKS = "dsee_masks.safetensors"


def sound(folder: Path) -> Path:
    """The folder's mask file, once all of the folder is verified."""
    stored = open_folder(folder, ("training_state",))
    stored.verify_all()
    return folder / MASKS


def same_weights(model: Any, folder: Path) -> bool:
    """Whether a fresh base with the folder's adapter and masks has a model's weights."""
    fresh = build(llama_config())
    load_adapter(fresh, folder)
    found, expected = fresh.state_dict(), model.state_dict()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_share_a_mask_file_until_the_next_pruning(tmp_path):
    model = tuned(llama_config(), LLAMA)
    for name in "abc":
        save_training_state(model, tmp_path / name)
    assert os.path.samefile(sound(tmp_path / "a"), sound(tmp_path / "b"))
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    save_training_state(model, tmp_path / "c", overwrite=True)
    assert os.path.samefile(tmp_path / "b" / MASKS, sound(tmp_path / "c"))
    dsee_scale.prune(model, PruneConfig(sparsity=0.6, score="WABS"))
    save_training_state(model, tmp_path / "d")
    assert not os.path.samefile(sound(tmp_path / "c"), sound(tmp_path / "d"))
    assert same_weights(model, tmp_path / "d")


def test_the_checkpoint_that_had_the_masks_may_be_gone(tmp_path):
    model = tuned(llama_config(), LLAMA)
    save_training_state(model, tmp_path / "a")
    (tmp_path / "a" / MASKS).write_bytes(b"cut off")
    save_training_state(model, tmp_path / "b")
    (tmp_path / "b" / MASKS).unlink()
    save_training_state(model, tmp_path / "c")
    assert sound(tmp_path / "c") and same_weights(model, tmp_path / "c")


def test_where_a_file_can_have_one_name_alone_it_is_copied(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    model = tuned(llama_config(), LLAMA)
    save_training_state(model, tmp_path / "a")
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("dsee_scale.checkpoint.adapter.save_masks", refuse)
    save_training_state(model, tmp_path / "b")
    assert not os.path.samefile(sound(tmp_path / "a"), sound(tmp_path / "b"))
    assert same_weights(model, tmp_path / "b")


def test_weights_that_someone_else_loads_get_masks_of_their_own(tmp_path):
    model = tuned(llama_config(), LLAMA)
    save_training_state(model, tmp_path / "a")
    name = next(name for name, _ in model.named_parameters() if name.endswith("q_proj.weight"))
    values = torch.ones_like(model.get_parameter(name))
    model.load_state_dict({name: values}, strict=False)
    save_training_state(model, tmp_path / "b")
    assert not os.path.samefile(sound(tmp_path / "a"), sound(tmp_path / "b"))
    load_training_state(model, tmp_path / "a", settings=False)
    assert (model.get_parameter(name) == 0).any(), "masks that the model lacks are applied"


@pytest.mark.parametrize("line", ["row", "column"])
def test_weights_that_lack_one_line_alone_are_told_from_dense_ones(tmp_path, line):
    """Removed units leave few zeros, next to each other."""
    model = build(
        llama_config(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, intermediate_size=300)
    )
    dsee_scale.inject(model, LLAMA)
    dsee_scale.prune(model, PruneConfig(pattern="neurons", score="W", num_per_layer=1))
    save_training_state(model, tmp_path / "a")
    of_neurons = "gate_proj.weight" if line == "row" else "down_proj.weight"
    name = next(name for name, _ in model.named_parameters() if name.endswith(of_neurons))
    model.load_state_dict({name: torch.ones_like(model.get_parameter(name))}, strict=False)
    save_training_state(model, tmp_path / "b")
    assert not os.path.samefile(sound(tmp_path / "a"), sound(tmp_path / "b"))
    load_training_state(model, tmp_path / "a", settings=False)
    assert (model.get_parameter(name) == 0).any()


def test_a_resumed_model_goes_on_with_the_files_and_masks_are_read_once(tmp_path, monkeypatch):
    save_training_state(tuned(llama_config(), LLAMA), tmp_path / "a")
    model = build(llama_config())
    load_adapter(model, tmp_path / "a")
    monkeypatch.setattr("dsee_scale.checkpoint.training_state.open_masks", None)
    load_training_state(model, tmp_path / "a", settings=False)
    save_training_state(model, tmp_path / "b")
    assert os.path.samefile(sound(tmp_path / "a"), sound(tmp_path / "b"))


def test_a_state_is_not_there_until_it_is_finished_and_holds_what_was_when_it_was_started(tmp_path):
    model = tuned(llama_config(), LLAMA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    started = start_training_state(model, tmp_path / "a")
    dsee_scale.prune(model, PruneConfig(sparsity=0.6, score="WABS"))
    assert not (tmp_path / "a").exists()
    started.finish()
    sound(tmp_path / "a")
    fresh = build(llama_config())
    load_adapter(fresh, tmp_path / "a")
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in before.items())
    save_training_state(model, tmp_path / "b")
    assert not os.path.samefile(tmp_path / "a" / MASKS, sound(tmp_path / "b"))
    assert same_weights(model, tmp_path / "b")


def test_a_disk_that_fails_behind_the_training_is_an_error_and_the_old_state_stays(tmp_path, monkeypatch):
    def fail(file: HashedFile) -> None:
        raise OSError(5, "Input/output error", str(file.path))

    model = tuned(llama_config(), LLAMA)
    save_training_state(model, tmp_path / "a", extra={"step": 1})
    monkeypatch.setattr(HashedFile, "settle", fail)
    started = start_training_state(model, tmp_path / "a", overwrite=True)
    with pytest.raises((FormatError, OSError), match="Input/output error"):
        started.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    sound(tmp_path / "a")


class Seen(TrainerCallback):
    """Which checkpoints are there at the end of each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found.append(sorted(path.name[-1] for path in self.folder.glob("checkpoint-*")))


class Told(Seen):
    """The same, when a checkpoint is said to be saved."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Seen, [[], [], ["2"], ["2"], ["2", "4"], ["2", "4"]]), (Told, [["2"], ["2", "4"], ["2", "4", "6"]])],
)
def test_a_trainers_checkpoint_is_there_after_the_next_step_or_before_someone_is_told(
    tmp_path, kind, expected
):
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback(PruneConfig(sparsity=0.5, score="W"), 1))
    seen = kind(tmp_path / "run")
    trainer.add_callback(seen)
    trainer.train()
    assert seen.found == expected
    masks = [sound(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4, 6)]
    assert all(os.path.samefile(masks[0], other) for other in masks)


class Failing(TrainerCallback):
    """Runs out of memory when the third step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("place", ["forward", "callback"])
def test_an_error_does_not_take_the_checkpoint_before_it_along(tmp_path, place):
    model, calls = model_of(), []
    dsee_scale.inject(model, CONFIG)
    trainer = trainer_of(model, tmp_path / "run", DSEECallback())

    def fail_in_the_third_step(module: Any, args: Any) -> None:
        calls.append(module.training)
        if sum(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    if place == "forward":
        model.register_forward_pre_hook(fail_in_the_third_step)
    else:
        trainer.add_callback(Failing())
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    open_folder(tmp_path / "run" / "checkpoint-2", ("training_state",)).verify_all()


@pytest.mark.parametrize(("rows", "columns"), [(2048, 2048), (2048, 5632), (4096, 4096)])
def test_a_sample_leaves_out_no_head_and_no_range_of_columns(rows, columns):
    seen = []
    for rank in range(2):
        half = torch.zeros(1).expand(rows * columns // 2)
        shard = Shard(half, rank * half.numel())
        seen.append(shard.start + _spread(shard))
    positions = torch.cat(seen)
    for lines, length in ((positions // columns, rows), (positions % columns, columns)):
        found = lines.unique()
        gaps = torch.cat([found, torch.tensor([length])]).diff()
        assert int(gaps.max()) <= 48 and int(found[0]) <= 48
