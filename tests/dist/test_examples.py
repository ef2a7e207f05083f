"""The examples run as their first lines say, under real launchers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import build, llama_config

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat and the dog sat on the log while the bird sang of the sea\n" * 40


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer of its own, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=97, special_tokens=["<unk>", "</s>"])
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    config = llama_config(hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    build(config, torch.bfloat16).save_pretrained(folder / "model")
    return folder


LAUNCHES = {
    "deepspeed_loop.py": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    "accelerate_loop.py": [
        "accelerate",
        "launch",
        "--main_process_port",
        "PORT",
        "--config_file",
        "ds_configs/accelerate_cpu.yaml",
    ],
}


@pytest.mark.parametrize("example", list(LAUNCHES))
def test_the_example_tunes_prunes_and_exports(example, inputs, tmp_path):
    command = [word.replace("PORT", free_port()) for word in LAUNCHES[example]]
    command += [f"examples/{example}", "--model", str(inputs / "model"), "--text", str(inputs / "text.txt")]
    command += ["--output_dir", str(tmp_path / "out"), "--steps", "6", "--block_size", "16"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "50.00%" in run.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    weights = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros >= round(sum(w.numel() for w in weights) / 2)
