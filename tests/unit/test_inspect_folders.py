"""Folders that a command or a call cannot take: it says what they are, and what to give or to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.training_state import save_training_state
from dsee_scale.cli import main
from dsee_scale.errors import FormatError
from dsee_scale.export.export import export_model
from dsee_scale.export.lora import export_lora
from tests.models import build, llama_config, moe_config
from tests.unit.test_cli import tune

CONFIG = DSEEConfig(rank=3, num_sparse=5, support="magnitude")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output folder with a model and an adapter, and beside it a LoRA, a checkpoint and an injected model."""
    folder = tmp_path_factory.mktemp("made")
    model = build(llama_config()).eval()
    model.save_pretrained(folder / "base")
    tune(model, CONFIG, mask_update=False)
    export_model(model, folder / "run" / "model", delta="dense")
    save_adapter(model, folder / "run" / "adapter")
    (folder / "run" / "recipe.yaml").write_text("model: {name: base}\n")
    export_lora(model, folder / "lora")
    save_training_state(model, folder / "state")
    model.save_pretrained(folder / "injected")
    model.save_pretrained(folder / "parts", max_shard_size="20KB")
    return folder


@pytest.fixture
def refused(made, tmp_path, capsys, monkeypatch):
    """The error line of a command in the fixture's folder."""

    def run(*words: str) -> str:
        shutil.copytree(made, tmp_path / "made")
        monkeypatch.chdir(tmp_path / "made")
        capsys.readouterr()
        assert main(list(words)) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "Traceback" not in text
        return text

    return run


@pytest.mark.parametrize("name", ["injected", "parts"])
def test_an_injected_model_saved_by_save_pretrained_is_refused_with_the_way_out(made, refused, name):
    with pytest.raises(FormatError, match=r"injected model.*without its update.*export_model.*save_adapter"):
        dsee_scale.load_pretrained(made / name)
    assert "injected model" in refused("inspect", name)


@pytest.mark.parametrize("form", ["model", "lora"])
def test_no_adapter_is_exported_onto_an_injected_model(refused, form):
    words = ["--base", "injected", "--output", "out", "--format", form]
    assert "injected model" in refused("export", "run/adapter", *words)
    assert not Path("out").exists()


def test_a_model_with_injected_experts_that_was_saved_so_is_refused(tmp_path):
    model = build(moe_config("qwen3_moe"))
    experts = DSEEConfig(rank=2, num_sparse=3, support="magnitude", target_modules=("experts",))
    dsee_scale.inject(model, experts)
    model.save_pretrained(tmp_path / "injected")
    with pytest.raises(FormatError, match="injected model"):
        dsee_scale.load_pretrained(tmp_path / "injected")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["inspect", "run"], "run/model or run/adapter"),
        (["export", "run", "--base", "base", "--output", "out"], "give run/adapter"),
        (["export", "run", "--base", "base", "--output", "out", "--format", "lora"], "give run/adapter"),
        (["push", "run", "me/model"], "run/model or run/adapter"),
    ],
)
def test_for_a_runs_output_folder_the_folders_in_it_are_named(refused, words, named):
    text = refused(*words)
    assert named in text and "save_pretrained" not in text


def test_of_a_runs_folders_those_that_are_there_are_named(made, tmp_path):
    with pytest.raises(FormatError, match=r"give .*/run/model$"):
        dsee_scale.load_pretrained(made / "run")
    shutil.copytree(made / "run" / "adapter", tmp_path / "run" / "adapter")
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        dsee_scale.load_pretrained(tmp_path / "run")


def test_an_empty_folder_and_a_damaged_model_are_named_by_what_is_wrong(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "holds no model.safetensors" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_a_plain_model_with_an_adapter_beside_is_inspected(made, tmp_path, capsys):
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "run" / "adapter", tmp_path / "base" / "adapter")
    assert main(["inspect", str(tmp_path / "base")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("ours", [True, False])
def test_inspect_shows_a_lora_folder(made, tmp_path, capsys, ours):
    folder = Path(shutil.copytree(made / "lora", tmp_path / "lora"))
    if not ours:  # as PEFT leaves it
        (folder / "dsee_manifest.json").unlink()
        shutil.rmtree(folder / "base")
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"{folder}: lora" in text and "4 (q_proj, v_proj)" in text and "rank" in text
    assert "adapter_model.safetensors" in text
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "lora" and found["matrices"] == []
    assert (
        found["files"]["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").stat().st_size
    )


def test_a_folder_of_another_kind_is_refused_with_a_next_step(made, refused):
    for name in ("run/adapter", "state", "lora"):
        with pytest.raises(FormatError, match=r"expected: export; load its base.*load_adapter"):
            dsee_scale.load_pretrained(made / name)
    text = refused("export", "run/model", "--base", "base", "--output", "out")
    assert "expected: adapter or training_state; it is a whole model" in text


def test_verify_says_that_the_files_match(made, tmp_path, capsys):
    for name in ("run/model", "run/adapter", "lora"):
        files = json.loads((made / name / "dsee_manifest.json").read_text())["files"]
        assert main(["inspect", str(made / name), "--verify"]) == 0
        assert f"all {len(files)} files match dsee_manifest.json" in capsys.readouterr().out
        assert main(["inspect", str(made / name)]) == 0
        assert "match" not in capsys.readouterr().out
    assert main(["inspect", str(made / "run" / "adapter"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == "all 3 files match dsee_manifest.json"
    assert main(["inspect", str(made / "base"), "--verify"]) == 0
    assert "no dsee_manifest.json" in capsys.readouterr().out


def test_damage_to_a_verified_folder_is_still_an_error(made, tmp_path):
    folder = Path(shutil.copytree(made / "run" / "adapter", tmp_path / "adapter"))
    data = bytearray((folder / "dsee_adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "dsee_adapter.safetensors").write_bytes(data)
    assert main(["inspect", str(folder), "--verify"]) == 1


def test_a_plain_model_loads_as_before(made):
    assert torch.isfinite(dsee_scale.load_pretrained(made / "base").lm_head.weight).all()
