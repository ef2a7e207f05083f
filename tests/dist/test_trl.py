"""The TRL examples on two ZeRO-3 ranks: unmodified trainers, small checkpoints, exact zeros, resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist.pool import free_port
from tests.dist.run_inputs import BAD, GOOD, SUBJECTS, write_inputs
from tests.dist.test_examples import ROOT
from tests.models import build, llama_config
from tests.unit.test_export import read_weights

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    write_inputs(folder)
    words = AutoTokenizer.from_pretrained(folder / "model")
    sizes = dict(hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    special = dict(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None)
    build(llama_config(vocab_size=len(words), **sizes, **special)).save_pretrained(folder / "model")  # type: ignore[operator]
    rng = random.Random(0)
    with (folder / "sft.jsonl").open("w") as sft, (folder / "dpo.jsonl").open("w") as dpo:
        for _ in range(64):
            prompt = f"the {rng.choice(SUBJECTS)} is"
            good, bad = f" {rng.choice(GOOD)} and the {rng.choice(SUBJECTS)}", f" {rng.choice(BAD)}"
            sft.write(json.dumps({"prompt": prompt, "completion": good}) + "\n")
            dpo.write(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")
    return folder


def launch(example: str, texts: Path, output: Path, *more: str) -> str:
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), f"examples/{example}.py"]
    data = texts / f"{example.removeprefix('trl_')}.jsonl"
    command += ["--model", str(texts / "model"), "--data", str(data), "--output_dir", str(output)]
    command += ["--max_steps", "4", "--save_steps", "2", *more]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def no_base_weight(output: Path) -> None:
    checkpoints = list(output.glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        assert not [path.name for path in checkpoint.rglob("*") if not path.name.startswith("dsee_")]


def test_sft_prunes_half_exports_and_resumes(texts, tmp_path):
    output = tmp_path / "out"
    launch("trl_sft", texts, output)
    no_base_weight(output)
    first = read_weights(output / "model")
    zeros = {name: value == 0 for name, value in first.items() if "_proj" in name}
    assert len(zeros) == 14
    gone = sum(int(mask.sum()) for mask in zeros.values())
    assert abs(gone / sum(mask.numel() for mask in zeros.values()) - 0.5) < 0.001
    shutil.rmtree(output / "checkpoint-4")
    launch("trl_sft", texts, output, "--resume")
    for name, value in read_weights(output / "model").items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)
        assert name not in zeros or torch.equal(value == 0, zeros[name])


def test_dpo_needs_no_second_model_and_leaves_a_lora_on_a_pruned_base(texts, tmp_path):
    output = tmp_path / "out"
    text = launch("trl_dpo", texts, output)
    no_base_weight(output)
    assert "--max-lora-rank" in text
    base = AutoModelForCausalLM.from_pretrained(output / "lora" / "base")
    for name, weight in base.named_parameters():
        if "_proj" in name:
            assert int((weight == 0).sum()) == round(weight.numel() / 2), name
    assert PeftModel.from_pretrained(base, output / "lora").get_nb_trainable_parameters()[1] > 0
