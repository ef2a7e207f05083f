"""An overwrite deletes what dsee_scale wrote, as it was written, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.files import MANIFEST, sha256
from dsee_scale.checkpoint.training_state import save_training_state
from dsee_scale.data.tokenizer import open_tokenizer
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import export_model
from dsee_scale.export.from_files import export_files
from dsee_scale.export.lora import export_lora, export_lora_files
from tests.dist.run_inputs import write_inputs
from tests.models import build, llama_config
from tests.unit.test_adapter_files import LLAMA

pytestmark = pytest.mark.unit
MINE = (
    ".git/config",
    ".env",
    "dsee_notes.md",
    "thesis.tex",
    "model-notes.safetensors",
    "data/x.csv",
    "dsee_x.json",
)


@pytest.fixture(scope="module")
def model():
    found = build(llama_config())
    dsee_scale.inject(found, LLAMA)
    dsee_scale.prune(found, PruneConfig(score="W"))
    return found


def listed(folder: Path, name: str) -> None:
    """Put a file of the user's into the manifest, with the right hash."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("save", [save_adapter, save_training_state, export_model], ids=lambda f: f.__name__)
def test_whatever_else_lies_in_a_folder_stays(model, tmp_path, save):
    folder = tmp_path / "out"
    save(model, folder)
    save(model, folder, overwrite=True)
    for name in (
        ".git/config",
        ".env",
        "dsee_notes.md",
        "thesis.tex",
        "model-notes.safetensors",
        "data/x.csv",
        "dsee_adapter.txt",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        if name == "thesis.tex":
            listed(folder, name)
        with pytest.raises(ConfigError, match="files that dsee_scale did not write"):
            save(model, folder, overwrite=True)
        assert path.read_text() == "mine"
        path.unlink()
        if path.parent != folder:
            path.parent.rmdir()
    (folder / "adapter").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="did not write"):
        save(model, folder, overwrite=True)
    (folder / "adapter").unlink()


def test_a_changed_file_of_an_export_stays_and_a_damaged_one_of_a_checkpoint_goes(model, tmp_path):
    export_model(model, tmp_path / "model", delta="separate")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ConfigError, match=r"changed since \(config.json\)"):
        export_model(model, tmp_path / "model", overwrite=True)
    save_training_state(model, tmp_path / "state")
    for name in ("dsee_manifest.json", "dsee_adapter.safetensors"):
        (tmp_path / "state" / name).write_bytes(b"\0")
    save_training_state(model, tmp_path / "state", overwrite=True)


def test_a_folder_of_another_kind_is_not_replaced(model, tmp_path):
    save_adapter(model, tmp_path / "a")
    for save in (save_training_state, export_model):
        with pytest.raises(ConfigError, match="holds a saved adapter"):
            save(model, tmp_path / "a", overwrite=True)


def test_an_output_is_never_an_input(model, tmp_path):
    build(llama_config()).save_pretrained(tmp_path / "in" / "base")  # type: ignore[operator]
    save_adapter(model, tmp_path / "in" / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "base")
    before = sorted(tmp_path.rglob("*"))
    for output in ("in/adapter", "in/base", "in", "link"):
        with pytest.raises(ConfigError, match="would delete what is read"):
            export_files(
                tmp_path / "in" / "adapter", tmp_path / "in" / "base", tmp_path / output, overwrite=True
            )
    assert sorted(tmp_path.rglob("*")) == before
    live = dsee_scale.load_pretrained(_exported(tmp_path))
    dsee_scale.inject(live, LLAMA)
    with pytest.raises(ConfigError, match="would delete what is read"):
        export_model(live, tmp_path / "model", overwrite=True)


def test_a_base_that_the_adapter_names_is_an_input_too(tmp_path):
    """Of an export from files, and of a LoRA's base beside it."""
    build(llama_config()).save_pretrained(tmp_path / "raw")
    base = dsee_scale.load_pretrained(tmp_path / "raw")
    dsee_scale.inject(base, LLAMA)
    dsee_scale.prune(base, PruneConfig(score="W", mask_update=False))
    export_lora(base, tmp_path / "lora")
    export_lora(base, tmp_path / "lora", overwrite=True)  # whose base is written anew
    second = dsee_scale.load_pretrained(tmp_path / "lora" / "base")
    dsee_scale.inject(second, LLAMA)
    save_adapter(second, tmp_path / "second")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for work in (
        lambda: export_files(tmp_path / "second", None, tmp_path / "lora" / "base", overwrite=True),
        lambda: export_lora_files(tmp_path / "second", tmp_path / "lora", overwrite=True),
        lambda: export_lora_files(
            tmp_path / "second", tmp_path / "lora", base=tmp_path / "lora" / "base", overwrite=True
        ),
        lambda: export_lora(second, tmp_path / "lora", overwrite=True),
    ):
        with pytest.raises(ConfigError, match="would delete what is read"):
            work()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_chat_templates_beyond_the_first_are_ours_as_long_as_they_are_as_written(model, tmp_path):
    write_inputs(tmp_path)
    tokenizer = open_tokenizer(str(tmp_path / "model"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    for overwrite in (False, True, True):
        export_model(model, tmp_path / "out", tokenizer=tokenizer, overwrite=overwrite)
    template = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    for change in ("mine", None):
        other = template.with_name("notes.txt")
        other.write_text("mine") if change is None else template.write_text(change)
        with pytest.raises(ConfigError, match=r"changed since \(additional_chat_templates/"):
            export_model(model, tmp_path / "out", tokenizer=tokenizer, overwrite=True)
        template.write_text("{{ tools }}")


def _exported(tmp_path: Path) -> Path:
    export_files(tmp_path / "in" / "adapter", tmp_path / "in" / "base", tmp_path / "model")
    return tmp_path / "model"


def test_a_link_is_followed_and_stays(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        save_adapter(model, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / MANIFEST).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
