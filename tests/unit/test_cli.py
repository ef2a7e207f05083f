"""`dsee-scale inspect` and `export` work on folders alone and explain what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.training_state import save_training_state
from dsee_scale.cli import main
from dsee_scale.export.export import export_model
from tests.models import build, gpt2_config, llama_config, token_batch

CONFIGS = {
    "llama": (llama_config(), DSEEConfig(rank=3, num_sparse=11, support="magnitude")),
    "gpt2": (
        gpt2_config(),
        DSEEConfig(
            rank=3,
            num_sparse=11,
            support="magnitude",
            target_modules=("c_attn",),
            output_slices={"c_attn": ("q", "v")},
        ),
    ),
}


def tune(model: nn.Module, config: DSEEConfig, mask_update: bool = True) -> nn.Module:
    dsee_scale.inject(model, config)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.dsee_B.normal_(std=0.05)
            layer.dsee_values.normal_(std=0.05)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, mask_update=mask_update, score="W"))
    return model


@pytest.fixture
def folders(tmp_path):
    """A base, its adapter, and the model in memory."""

    def make(family: str, dtype=torch.float32, mask_update=True):
        base, config = CONFIGS[family]
        model = build(base, dtype).eval()
        model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        tune(model, config, mask_update)
        save_adapter(model, tmp_path / "adapter")
        return model

    return make


def read_weights(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("delta", ["masked", "dense", "separate"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_export_from_files_equals_export_of_the_model(folders, tmp_path, capsys, family, delta):
    model = folders(family, torch.bfloat16, mask_update=delta != "dense")
    base, out = str(tmp_path / "base"), tmp_path / "out"
    assert (
        main(["export", str(tmp_path / "adapter"), "--base", base, "--output", str(out), "--delta", delta])
        == 0
    )
    assert "entries of pruned weights are zero" in capsys.readouterr().out
    export_model(model, tmp_path / "expected", delta=delta)
    found, expected = read_weights(out), read_weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (out / "tokenizer.json").exists()
    assert sorted(p.name for p in out.glob("model*")) == sorted(
        p.name for p in (tmp_path / "base").glob("model*")
    )
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    if delta == "separate":
        dsee_scale.load_adapter(loaded, out / "adapter")
        with torch.no_grad():
            assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)


def test_a_base_stored_in_float32_is_written_as_it_was_tuned(folders, tmp_path):
    model = folders("llama", torch.bfloat16)
    wide = {name: t.float() for name, t in read_weights(tmp_path / "base").items()}
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    save_file(wide, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    assert (
        main(["export", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--output", str(out)])
        == 0
    )
    export_model(model, tmp_path / "expected")
    expected = read_weights(tmp_path / "expected")
    assert all(torch.equal(t, expected[name]) for name, t in read_weights(out).items())


def test_a_classifier_head_that_the_base_lacks_is_added(tmp_path):
    """The base's files hold a bare decoder without the prefix, as many hub repositories do."""
    torch.manual_seed(0)
    config = gpt2_config(num_labels=3, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.transformer.save_pretrained(tmp_path / "base")
    settings = DSEEConfig(
        rank=2, num_sparse=5, support="magnitude", target_modules=("c_attn",), trained_modules=("score",)
    )
    tune(model, settings, mask_update=False)
    save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    base = str(tmp_path / "base")
    assert (
        main(["export", str(tmp_path / "adapter"), "--base", base, "--output", str(out), "--delta", "dense"])
        == 0
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_batch()).logits, model(token_batch()).logits)


def test_inspect_counts_the_zeros_of_an_adapter_and_of_a_model(folders, tmp_path, capsys):
    model = folders("llama")
    export_model(model, tmp_path / "out")
    params = dict(model.named_parameters())
    assert main(["inspect", str(tmp_path / "adapter"), "--json", "--verify"]) == 0
    adapter = json.loads(capsys.readouterr().out)
    assert adapter["kind"] == "adapter" and len(adapter["matrices"]) == 14
    for row in adapter["matrices"]:
        assert row["zeros"] == int((params[row["name"]] == 0).sum())
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["kind"] == "export"
    weights = read_weights(tmp_path / "out")
    assert {row["name"] for row in exported["matrices"]} == {n for n, t in weights.items() if t.dim() == 2}
    for row in exported["matrices"]:
        assert row["zeros"] == int((weights[row["name"]] == 0).sum())


def test_inspect_prints_groups_and_each_matrix_on_request(folders, tmp_path, capsys):
    model = folders("llama")
    main(["inspect", str(tmp_path / "adapter")])
    text = capsys.readouterr().out
    assert "2 x self_attn.q_proj.weight" in text and "rank 3" in text and "unstructured" in text
    main(["inspect", str(tmp_path / "adapter"), "--each"])
    assert "model.layers.1.self_attn.q_proj.weight" in capsys.readouterr().out
    save_training_state(model, tmp_path / "state", extra={"phase": "tune"})
    main(["inspect", str(tmp_path / "state")])
    text = capsys.readouterr().out
    assert "training state" in text and "phase" in text
    main(["inspect", str(tmp_path / "base")])
    assert "LlamaForCausalLM" in capsys.readouterr().out


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_inspect_names_the_pattern_and_what_it_gains(tmp_path, capsys):
    model = build(llama_config())
    dsee_scale.prune(model, PruneConfig(pattern="2:4", modules=("q_proj", "k_proj", "v_proj"), score="W"))
    export_model(model, tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "2:4" in text and "fit 2:4 kernels" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere is not a folder"),
        (["inspect", "."], "holds saved folders (a run's output does): give adapter"),
        (["export", "nowhere", "--base", "base", "--output", "out"], "nowhere is not a folder"),
        (["push", "nowhere", "me/model"], "nowhere is not a folder"),
        (["export", "base", "--base", "base", "--output", "out"], "holds no dsee_manifest.json"),
        (["export", "adapter", "--base", "nowhere", "--output", "out"], "base nowhere is not a folder"),
        (["export", "adapter", "--base", "adapter", "--output", "out"], "adapter holds no model.safetensors"),
        (["export", "adapter", "--base", "base", "--output", "base"], "base is, or holds, the input base"),
    ],
)
def test_errors_are_one_line_without_traceback(folders, tmp_path, capsys, monkeypatch, arguments, message):
    folders("llama")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_and_another_base_are_refused(folders, tmp_path, capsys):
    folders("llama")
    export = [
        "export",
        str(tmp_path / "adapter"),
        "--base",
        str(tmp_path / "base"),
        "--output",
        str(tmp_path / "o"),
    ]
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert main(export) == 1
    assert "num_hidden_layers 2 there, 3 here" in capsys.readouterr().err
    flip(tmp_path / "adapter" / "dsee_masks.safetensors")
    assert main(export) == 1
    assert "dsee_masks.safetensors is damaged" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "adapter"), "--verify"]) == 1
    assert not (tmp_path / "o").exists()


def test_wrong_usage_is_2_and_ctrl_c_is_130(monkeypatch, tmp_path, capsys):
    for words in (
        ["inspect"],
        ["export", "x"],
        ["push", "x"],
        ["eval", "x"],
        ["plan", "--gpus", "many"],
        ["no"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert main(["run"]) == 2
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers have none
    interrupt = lambda *_, **__: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr("dsee_scale.export.folder_report.inspect_folder", interrupt)
    try:
        assert main(["inspect", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, kept)
    assert "Traceback" not in capsys.readouterr().err


def test_help_and_version_need_no_heavy_import(tmp_path):
    code = "import sys; from dsee_scale.cli import main\n"
    code += "try: main(['export', '--help'])\nfinally: print(sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--base FOLDER" in run.stdout and "'transformers'" not in run.stdout


SIGNALLED = """
import os, signal, time
from dsee_scale import sigterm
from dsee_scale.cli import _stop_on_sigterm
from dsee_scale.errors import RunStoppedError

_stop_on_sigterm()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
except RunStoppedError:
    os.kill(os.getpid(), signal.SIGTERM)
    print("cleaned up", flush=True)
sigterm.PASSED_ON = 0
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


def test_a_sigterm_that_is_passed_on_lets_a_run_clean_up_and_a_later_one_ends_it():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "cleaned up\n"), done.stderr
