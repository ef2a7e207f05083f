"""The README's targets exist, and the DeepSpeed tutorial runs as printed. Its snippet: tests/unit/test_docs.py; its
shell commands: tests/unit/test_readme_commands.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.dist.pool import free_port
from tests.models import build, llama_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LOOP = (ROOT / "docs" / "tutorials" / "deepspeed_loop.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_loop_of_the_tutorial_runs_under_zero3(tmp_path):
    """In fresh processes: those of a pool have imported more than the page does."""
    from transformers import AutoModelForCausalLM

    import dsee_scale

    (snippet,) = re.findall(r"^```python\n(.*?)^```", LOOP, flags=re.DOTALL | re.MULTILINE)
    assert MODEL in snippet and "4e4" in snippet
    # No weight of this small model is to stay whole on every rank.
    code = snippet.replace(MODEL, f"{tmp_path}/published").replace("4e4", "0")
    config = llama_config(hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    build(config, torch.bfloat16).save_pretrained(tmp_path / "published")
    (tmp_path / "loop.py").write_text(code)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "loop.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    # The adapter belongs to the re-fitted base, and the two give what was exported.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    dsee_scale.load_adapter(model, tmp_path / "out" / "adapter")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exported(ids).logits, rtol=0.02, atol=0.02)


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) | set(
        re.findall(r"`make ([\w-]+)`", README)
    )
    assert targets >= {"demo", "test", "docs-serve"}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:launch|recipes|ds_configs|docs)/[\w./]+\.(?:sh|py|yaml|json|md|svg)", README))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
