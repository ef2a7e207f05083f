"""A push is one commit of whole files, or none; what it names, others can load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig

import dsee_scale
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.cli import main
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import export_model
from dsee_scale.export.hub import push_to_hub
from dsee_scale.export.lora import export_lora
from tests.dist.run_inputs import write_inputs
from tests.fake_hub import FakeHub, running_hub
from tests.models import build, llama_config, token_batch
from tests.unit.test_cli import CONFIGS, tune
from tests.unit.test_run_promises import launch, plain


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in a folder of this machine, and what was made of it."""
    folder = tmp_path_factory.mktemp("hub")
    build(llama_config()).save_pretrained(folder / "base")
    model = dsee_scale.load_pretrained(folder / "base")
    tune(model, CONFIGS["llama"][1], mask_update=False)
    export_model(model, folder / "model", max_shard_size="30KB", notes="![x](dsee_quality.png)")
    save_adapter(model, folder / "adapter")
    export_lora(model, folder / "lora")
    return folder


def pulled(hub: FakeHub, repo: str, target: Path) -> Path:
    for name, content in hub.repos[repo].items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return target


def test_an_export_is_one_commit_that_loads_and_replaces_what_was_pushed_before(
    hub, folders, tmp_path, capsys
):
    hub.repos["me/tuned"] = {
        ".gitattributes": b"",
        "dsee_manifest.json": b'{"files": {"model-00007-of-00009.safetensors": {}, "config.json": {}, "old.json": {}}}',
        "model-00007-of-00009.safetensors": b"old",
        "config.json": b"old",
        "old.json": b"old",
        "notes.txt": b"mine",
        "onnx/model.safetensors": b"mine",
    }
    assert main(["push", str(folders / "model"), "me/tuned"]) == 0
    assert "/me/tuned/commit/" in capsys.readouterr().out
    assert hub.commits == {"me/tuned": 1}
    assert not {"model-00007-of-00009.safetensors", "old.json"} & hub.repos["me/tuned"].keys()
    assert hub.repos["me/tuned"]["notes.txt"] == hub.repos["me/tuned"]["onnx/model.safetensors"] == b"mine"
    assert main(["push", str(folders / "model"), "me/tuned"]) == 0
    assert hub.repos["me/tuned"]["onnx/model.safetensors"] == b"mine"
    there = pulled(hub, "me/tuned", tmp_path / "there")
    open_folder(there, ("export",)).verify_all()
    ids = token_batch()
    with torch.no_grad():
        here = dsee_scale.load_pretrained(folders / "model")(ids).logits
        assert torch.equal(dsee_scale.load_pretrained(there)(ids).logits, here)
    assert "from_pretrained('me/tuned')" in ModelCard.load(there / "README.md").text


@pytest.mark.parametrize("fault", ["upload", "commit"])
def test_a_push_that_fails_leaves_nothing_and_can_be_repeated(hub, folders, capsys, fault):
    hub.fault = fault
    assert main(["push", str(folders / "model"), "me/tuned"]) == 1
    assert "nothing of it is in me/tuned" in capsys.readouterr().err
    assert hub.repos["me/tuned"] == {".gitattributes": b""} and hub.commits == {}
    hub.fault = None
    assert main(["push", str(folders / "model"), "me/tuned"]) == 0
    assert hub.commits == {"me/tuned": 1}


def test_adapters_name_a_base_that_others_have(hub, folders, tmp_path, capsys):
    for kind in ("adapter", "lora"):
        assert main(["push", str(folders / kind), f"me/{kind}"]) == 1
        assert "not a repository that others can load" in capsys.readouterr().err
    assert hub.repos == {}
    assert main(["push", str(folders / "lora" / "base"), "me/pruned"]) == 0
    assert main(["push", str(folders / "lora"), "me/lora", "--base", "me/pruned"]) == 0
    lora = pulled(hub, "me/lora", tmp_path / "lora")
    open_folder(lora, ("lora",)).verify_all()
    assert PeftConfig.from_pretrained(str(lora)).base_model_name_or_path == "me/pruned"
    assert not any(name.startswith("base/") for name in hub.repos["me/lora"])
    card = ModelCard.load(lora / "README.md")
    assert card.data.base_model == "me/pruned" and "from_pretrained('me/pruned')" in card.text
    assert main(["push", str(folders / "adapter"), "me/adapter", "--base", "someone/base"]) == 0
    adapter = pulled(hub, "me/adapter", tmp_path / "adapter")
    record = dsee_scale.load_adapter(dsee_scale.load_pretrained(folders / "base"), adapter)
    assert record.base["id"] == "someone/base"
    assert ModelCard.load(adapter / "README.md").data.base_model == "someone/base"
    assert str(folders) not in str([*hub.repos["me/lora"].values(), *hub.repos["me/adapter"].values()])


def test_what_must_not_be_pushed_is_refused(hub, folders, tmp_path, capsys):
    hub.repos["me/theirs"] = {"pytorch_model.bin": b"theirs"}
    assert main(["push", str(folders / "model"), "me/theirs"]) == 1
    assert "files that dsee_scale did not push (pytorch_model.bin)" in capsys.readouterr().err
    hub.repos["me/damaged"] = {"dsee_manifest.json": b"{"}
    assert main(["push", str(folders / "model"), "me/damaged"]) == 1
    assert "dsee_manifest.json in me/damaged cannot be read" in capsys.readouterr().err
    assert main(["push", str(folders / "base"), "me/x"]) == 1
    assert "expected a folder that dsee_scale saved" in capsys.readouterr().err
    broken = tmp_path / "broken"
    export_model(dsee_scale.load_pretrained(folders / "base"), broken)
    (broken / "config.json").write_text((broken / "config.json").read_text().replace("40", "41"))
    assert main(["push", str(broken), "me/x"]) == 1
    assert "config.json is damaged" in capsys.readouterr().err
    assert set(hub.repos) == {"me/theirs", "me/damaged"} and hub.commits == {}


def test_export_pushes_what_it_wrote(hub, folders, tmp_path):
    words = ["--base", str(folders / "base"), "--output", str(tmp_path / "out"), "--delta", "dense"]
    assert main(["export", str(folders / "adapter"), *words, "--push_to_hub", "me/out"]) == 0
    open_folder(pulled(hub, "me/out", tmp_path / "there"), ("export",)).verify_all()


def test_a_recipe_pushes_what_it_exported_and_one_that_cannot_keeps_it(hub, tmp_path):
    write_inputs(tmp_path)
    export = {"check": False, "push_to_hub": "me/run"}
    steps = {"training__max_steps": 1, "retune": None, "prune": None}
    hub.fault = "commit"
    with pytest.raises(ConfigError, match="nothing of it is in me/run"):
        launch(plain(tmp_path, tmp_path / "run", export=export, **steps))
    saved = open_folder(tmp_path / "run" / "model", ("export",))
    saved.verify_all()
    hub.fault = None
    launch(plain(tmp_path, tmp_path / "again", export=export, **steps))
    assert hub.commits == {"me/run": 1} and set(saved.files) <= hub.repos["me/run"].keys()
    open_folder(pulled(hub, "me/run", tmp_path / "there"), ("export",)).verify_all()


def test_a_repository_may_be_called_as_a_folder_here_is(hub, folders, tmp_path, monkeypatch):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "model").symlink_to(folders / "model")
    monkeypatch.chdir(tmp_path)
    push_to_hub("me/model", "me/model")
    assert "config.json" in hub.repos["me/model"]
