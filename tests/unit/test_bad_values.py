"""Configs that would take hours, hubs that do not answer, weights that are no numbers: each is said soon, by name."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsee_scale
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.config import PruneConfig
from dsee_scale.errors import DSEEError, FormatError, TargetError
from dsee_scale.export.export import export_model
from dsee_scale.export.folder_report import inspect_folder
from dsee_scale.export.from_files import export_files
from dsee_scale.planning.shapes import find_shape
from dsee_scale.pretrained import reject_endless
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import load_model
from tests.fuzz.folders import refresh_manifest
from tests.models import build, llama_config
from tests.unit.test_adapter_files import LLAMA

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """`base`, `adapter` (pruned by heads and entries) and `model`, an export of them."""
    root = tmp_path_factory.mktemp("whole")
    model = build(llama_config(num_key_value_heads=5))
    model.save_pretrained(root / "base")  # type: ignore[operator]
    dsee_scale.inject(model, LLAMA)
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=1, score="W"))
    save_adapter(model, root / "adapter")
    export_model(model, root / "model")
    return root


@pytest.fixture
def folders(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "folders"))


def change(path: Path, **values: object) -> None:
    """In the first object that has the key, however deep."""
    tree = json.loads(path.read_text())
    spots = [tree]
    while spots:
        spot = spots.pop()
        if isinstance(spot, dict):
            spot.update({key: value for key, value in values.items() if key in spot})
            spots += spot.values()
    path.write_text(json.dumps(tree))
    refresh_manifest(path.parent)


@pytest.mark.parametrize("layers", [10**7, 2**62, 1e9])
def test_a_config_of_ten_million_layers_is_refused_at_once(folders, tmp_path, layers):
    change(folders / "adapter" / "dsee_config.json", num_hidden_layers=layers)
    change(folders / "base" / "config.json", num_hidden_layers=layers)
    change(folders / "model" / "config.json", num_hidden_layers=layers)
    calls = [
        lambda: inspect_folder(folders / "adapter"),
        lambda: export_files(folders / "adapter", folders / "base", tmp_path / "out"),
        lambda: find_shape(str(folders / "base")),
        lambda: load_model(ModelConfig(name=str(folders / "base")), torch.float32, None),  # type: ignore[arg-type]
        lambda: dsee_scale.load_pretrained(folders / "model"),
    ]
    started = time.process_time()
    for call in calls:
        with pytest.raises(DSEEError, match="num_hidden_layers is"):
            call()
    assert main(["plan", "--model", str(folders / "base"), "--gpus", "1", "--gpu-memory", "8"]) == 1
    assert time.process_time() - started < 5
    assert not (tmp_path / "out").exists()


def test_sizes_of_real_models_are_not_refused():
    sizes = {"vocab_size_per_layer_input": 262_144, "num_hidden_layers": 126, "num_labels": 21_843}
    reject_endless({**sizes, "n_routed_experts": 384, "layer_norm_eps": 1e-5, "n_layer": None}, "config")
    with pytest.raises(FormatError, match="num_local_experts"):
        reject_endless({"text_config": {"num_local_experts": 10**6}}, "config")


ASK = """
import sys, time
from dsee_scale.data.tokenizer import open_tokenizer
from dsee_scale.planning.shapes import find_shape
started = time.monotonic()
for call in (find_shape, open_tokenizer):
    try:
        call("someone/no-such-model")
        raise SystemExit("no error")
    except ValueError as error:
        assert "the hub did not answer within 3 s" in str(error), error
print("seconds", time.monotonic() - started)
"""


@pytest.mark.parametrize("hub", ["closed", "silent"])
def test_a_hub_that_is_not_there_is_said_in_seconds(hub, tmp_path):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if hub == "silent":
            port.listen()
        endpoint = f"http://127.0.0.1:{port.getsockname()[1]}"
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("seconds")[1]) < 15  # 3 s of waiting, and transformers' imports


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers_are_named(folders, tmp_path, name, value):
    for folder in ("base", "model"):
        path = folders / folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[3] = value
        save_file(tensors, path, {"format": "pt"})
        refresh_manifest(folders / folder)
    with pytest.raises(FormatError, match=name):
        export_files(folders / "adapter", folders / "base", tmp_path / "out")
    with pytest.raises(FormatError, match=name):
        dsee_scale.load_pretrained(folders / "model")
    model = build(llama_config())
    dict(model.named_parameters())[name].data.view(-1)[3] = value
    with pytest.raises(TargetError, match=f"{name} holds NaN or infinity"):
        dsee_scale.inject(model, LLAMA)
    with pytest.raises(FormatError, match=name):
        export_model(model, tmp_path / "out", delta="none")
    assert not list(tmp_path.glob("*out*"))
