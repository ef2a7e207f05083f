"""What only a GPU makes meaningful runs in its form anywhere: every case, tiny, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
THROUGH_THE_SCRIPT = ("test_zero3", "residual", "step_1b_zero3")
"""The other cases share one process here, which saves the start of each."""
pytestmark = pytest.mark.timeout(400)


def driver() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_every_case_runs_tiny_on_the_cpu(tmp_path):
    gpu = driver()
    own = [case for case in gpu.CASES if "benchmarks/_gpu_cases.py" in case.words]
    together = {case.words[2] for case in own if case.name not in THROUGH_THE_SCRIPT}
    assert together == {"step", "masks", "semi", "supports", "memory", "refit"}
    environment = {**os.environ, "PYTHON": sys.executable}
    options = ["--device", "cpu", "--tiny", str(tmp_path), "--only", *THROUGH_THE_SCRIPT]
    done = subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + (tmp_path / "log.txt").read_text()[-2000:]
    ended = {line["case"] for line in lines_of(done.stdout) if "seconds_left" in line}
    assert ended == set(THROUGH_THE_SCRIPT)
    command = [sys.executable, str(BENCHMARKS / "_gpu_cases.py"), "--tiny", "--case", *sorted(together)]
    more = subprocess.run(
        command, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert more.returncode == 0, more.stderr[-3000:]
    measured = [line for line in lines_of(done.stdout + more.stdout) if "metric" in line]
    assert len(measured) >= 30
    for line in measured:
        assert line["device"] == "CPU" and line["ours"] == line["ours"], line
        if line["unit"] == "s" and line["benchmark"] == "gpu" and "added" not in line["metric"]:
            assert 0 < line["floor"] <= line["ours"] and line["of_floor"] > 0, line
