"""ZeRO-3 in one process: on a GPU with NCCL what the same process does on the CPU, which is run here as well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.zero3_smoke import CASES

SCRIPT = Path(__file__).with_name("zero3_smoke.py")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(device: str, case: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    done = subprocess.run(
        [*words, str(SCRIPT), device, case, str(folder / device)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.dist
def test_the_smoke_test_itself_runs_on_the_cpu(tmp_path):
    found = run("cpu", "refit", tmp_path)
    assert found["distance"] < 1e-5 and found["removed"] > 0
    assert found["losses"][2] < found["losses"][0]


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("case", list(CASES))
def test_one_gpu_does_what_the_cpu_does(tmp_path, case):
    here, there = run("cuda", case, tmp_path), run("cpu", case, tmp_path)
    assert here["removed"] == there["removed"]
    assert here["losses"] == pytest.approx(there["losses"], rel=2e-3)
    assert here["distance"] < 1e-4
