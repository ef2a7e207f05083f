"""The README's code and commands work as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.models import build, llama_config, zero3_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def run_snippet(code: str, folder: str) -> list[str]:
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import dsee_scale

    os.chdir(folder)
    names = dict(vars(dsee_scale)) | {
        "dsee_scale": dsee_scale,
        "deepspeed": deepspeed,
        "torch": torch,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "HfDeepSpeedConfig": HfDeepSpeedConfig,
        "ds_config": zero3_config(torch.bfloat16),
        "name": f"{folder}/base",
    }
    exec(code, names)
    return sorted(str(p.relative_to(folder)) for p in Path(folder, "out").rglob("*.safetensors"))


def test_the_readmes_code_runs_under_zero3(pools, tmp_path):
    (snippet,) = code_blocks("python")
    config = llama_config(hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    build(config, torch.bfloat16).save_pretrained(tmp_path / "base")
    for found in pools(2).run(run_snippet, snippet, str(tmp_path)):
        assert "out/adapter/dsee_adapter.safetensors" in found
        assert any(name.startswith("out/model/model") for name in found)


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert targets >= {"demo", "test"}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_readmes_shell_commands_are_understood():
    commands = set(re.findall(r"^dsee-scale (\w+)", README, flags=re.MULTILINE))
    assert len(commands) >= 2
    for command in commands:
        run = [sys.executable, "-m", "dsee_scale", command, "--help"]
        assert "usage" in subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:launch|recipes|ds_configs|docs)/[\w./]+\.(?:sh|py|yaml|json|md)", README))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
