"""Folders from elsewhere: their code never runs unasked, and a changed file never loads."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.files import MANIFEST
from dsee_scale.cli import main
from dsee_scale.data.tokenizer import open_tokenizer
from dsee_scale.errors import ConfigError, DSEEError, FormatError
from dsee_scale.export.export import export_model
from dsee_scale.export.folder_report import inspect_folder
from dsee_scale.export.from_files import export_files
from dsee_scale.planning.shapes import find_shape
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import load_model, load_tokenizer
from tests.dist.run_inputs import write_inputs
from tests.models import build, llama_config
from tests.unit.test_adapter_files import LLAMA, tuned

pytestmark = pytest.mark.unit

EVIL = """from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A model folder that brings code, in front of a person who says yes to everything."""
    write_inputs(tmp_path)
    folder = tmp_path / "model"
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "MARK")))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        "tokenizer_class": "E",
    }
    for name, change in (
        ("config.json", {"model_type": "evil", "auto_map": classes}),
        ("tokenizer_config.json", tokenizer),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **change}))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return folder


def test_the_code_of_a_folder_runs_only_where_the_recipe_says_so(evil, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(tuned(llama_config(vocab_size=25), LLAMA), adapter)
    calls = [
        lambda: dsee_scale.load_pretrained(evil),
        lambda: find_shape(str(evil)),
        lambda: export_files(adapter, evil, tmp_path / "out"),
        lambda: open_tokenizer(str(evil), trust_remote_code=False),
        lambda: load_tokenizer(ModelConfig(name=str(evil))),
        lambda: load_model(ModelConfig(name=str(evil)), torch.float32, None),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(DSEEError):
            call()
    inspect_folder(evil)
    main(["plan", "--model", str(evil), "--gpus", "1", "--gpu-memory", "80"])
    assert not (tmp_path / "MARK").exists()
    load_tokenizer(ModelConfig(name=str(evil), trust_remote_code=True))
    assert (tmp_path / "MARK").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(tuned(llama_config(), LLAMA), folder)
    dsee_scale.load_pretrained(folder)
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "dsee_export.json"]
)
def test_every_file_that_is_used_is_compared_with_its_hash(copy, tmp_path, name):
    data = bytearray((copy / name).read_bytes())
    at = data.find(b"1e-06") if name == "config.json" else len(data) // 2
    data[at : at + 1] = b"9"
    (copy / name).write_bytes(data)
    with pytest.raises(FormatError, match=f"{name} is damaged"):
        dsee_scale.load_pretrained(copy)
    with pytest.raises(FormatError, match=f"{name} is damaged"):
        inspect_folder(copy, verify=True)


def test_a_manifest_that_is_gone_or_knows_less_than_the_folder_is_an_error(copy):
    for name in ("tokenizer.json", "adapter_config.json", "modeling_x.py", "model.safetensors.index.json"):
        (copy / name).write_text("{}")
        with pytest.raises(FormatError, match=f"{name} is not in"):
            dsee_scale.load_pretrained(copy)
        (copy / name).unlink()
    (copy / MANIFEST).unlink()
    for call in (dsee_scale.load_pretrained, inspect_folder):
        with pytest.raises(FormatError, match=f"holds no {MANIFEST}"):
            call(copy)


def test_a_base_that_was_saved_here_is_verified_before_it_is_exported_from(tmp_path):
    model = build(llama_config())
    dsee_scale.inject(model, LLAMA)
    save_adapter(model, tmp_path / "adapter")
    export_model(model, tmp_path / "base", delta="none")
    text = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(text.replace("1e-06", "1e-01"))
    with pytest.raises(FormatError, match=r"config\.json is damaged"):
        export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    with pytest.raises(ConfigError):
        export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "base", overwrite=True)


def test_local_data_touch_no_network(tmp_path, monkeypatch):
    import socket

    from dsee_scale.data.rows import read_file

    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: pytest.fail(f"looked up {a}"))
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert read_file(str(tmp_path / "rows.csv")).num_rows == 1


@pytest.mark.parametrize(
    "words", [["--gpus", "0"], ["--gpu-memory", "nan"], ["--length", "1" + "0" * 400], ["--num-sparse", "-1"]]
)
def test_a_plan_of_impossible_sizes_is_one_line(capsys, words):
    given = {"--model": "llama-3-8b", "--gpus": "1", "--gpu-memory": "80", **dict([words])}
    assert main(["plan", *(word for pair in given.items() for word in pair)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_of_the_largest_size_are_named_or_adapted():
    model = build(llama_config())
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.finfo(torch.float32).max)
    try:
        dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=2, num_sparse=4))
    except DSEEError as error:
        assert "weight" in str(error)
