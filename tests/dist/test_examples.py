"""The examples run with the words of their first lines; the one for accelerate under its launcher."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.dist.pool import free_port
from tests.models import build, llama_config

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat and the dog sat on the log while the bird sang of the sea\n" * 40


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


def words(inputs: Path, output: Path) -> list[str]:
    given = [
        "--model",
        str(inputs / "model"),
        "--text",
        str(inputs / "text.txt"),
        "--output_dir",
        str(output),
    ]
    return [*given, "--steps", "6", "--block_size", "16"]


def assert_half_is_zero(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros >= round(sum(w.numel() for w in weights) / 2)


def run_example(argv: list[str]) -> None:
    """What `deepspeed` does with the program on each rank."""
    os.chdir(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0])["main"]()


def test_the_loop_for_deepspeed_tunes_prunes_and_exports(pools, inputs, tmp_path):
    pools(2).run(run_example, ["examples/deepspeed_loop.py", *words(inputs, tmp_path / "out")])
    assert_half_is_zero(tmp_path / "out" / "model")


def test_the_loop_for_accelerate_tunes_prunes_and_exports(inputs, tmp_path):
    command = ["accelerate", "launch", "--main_process_port", str(free_port())]
    command += ["--config_file", "ds_configs/accelerate_cpu.yaml", "examples/accelerate_loop.py"]
    command += words(inputs, tmp_path / "out")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "50.00%" in run.stdout
    assert_half_is_zero(tmp_path / "out" / "model")


@pytest.mark.parametrize("example", ["accelerate_loop.py", "deepspeed_loop.py"])
def test_a_text_shorter_than_a_block_is_refused(inputs, tmp_path, example):
    (tmp_path / "short.txt").write_text("one two\n")
    token_blocks = runpy.run_path(str(ROOT / "examples" / example))["token_blocks"]
    with pytest.raises(SystemExit, match=r"short\.txt has \d+ tokens, expected at least one block of 64"):
        token_blocks(str(tmp_path / "short.txt"), str(inputs / "model"), 64)
