"""ms-swift, unmodified, tunes, prunes and retunes by its plugin: `make test-interop`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dsee_scale
from dsee_scale.passes.pools import block_linears
from tests.unit.test_docs import write_model

pytestmark = pytest.mark.skipif(find_spec("swift") is None, reason="ms-swift is not installed")
ROOT = Path(__file__).parents[2]
PLUGIN = """
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.integrations.ms_swift import register

register(DSEEConfig(rank=4, num_sparse=5, support="magnitude"), prune=PruneConfig(), at=0.5)
"""


def sft(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swift.cli.sft", "--model", str(folder / "model"), "--max_steps", "4"]
    command += ["--model_type", "llama", "--template", "llama3", "--max_length", "400", "--use_hf", "true"]
    command += ["--dataset", str(folder / "rows.jsonl"), "--external_plugins", str(folder / "plugin.py")]
    command += ["--output_dir", str(folder / "out"), "--add_version", "false", "--save_steps", "2"]
    command += ["--logging_steps", "1", "--per_device_train_batch_size", "2", "--torch_dtype", "float32"]
    command += ["--report_to", "none", "--tuner_type", "dsee", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift")
    write_model(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    (folder / "plugin.py").write_text(PLUGIN)
    said = [("the film plot is", answer) for answer in ("great warm", "dull weak") * 16]
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_it_tunes_prunes_and_saves_no_base_weight(inputs):
    run = sft(inputs, "--callbacks", "dsee")
    assert run.returncode == 0, run.stderr[-3000:]
    checkpoint = inputs / "out" / "checkpoint-4"
    assert all(path.name.startswith("dsee_") for path in checkpoint.iterdir())
    model = dsee_scale.load_pretrained(inputs / "out" / "base")  # what the re-fit left
    dsee_scale.load_adapter(model, checkpoint)
    weights = [module.weight for module in block_linears(model).values()]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share == pytest.approx(0.5, abs=0.02)


def test_without_the_callback_it_says_what_is_missing(inputs):
    run = sft(inputs, "--output_dir", str(inputs / "other"))
    assert run.returncode != 0 and "--callbacks dsee is missing" in run.stderr + run.stdout
