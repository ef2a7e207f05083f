"""What only a GPU makes meaningful runs in its form anywhere: every case, tiny, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
THROUGH_THE_SCRIPT = ("residual", "step_1b_zero3")
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


def test_a_case_that_fails_or_hangs_does_not_take_the_others_along(tmp_path, capfd):
    gpu = driver()
    rank = f"import os, time; open({str(tmp_path / 'rank')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    cases = [
        gpu.Case("fails", 20, ("-c", "print('{}'); raise SystemExit(3)")),
        gpu.Case("hangs", 5, ("-c", hang)),
        gpu.Case("works", 20, ("-c", "import os; print(os.environ['SET'])")),
        gpu.Case("late", 20, ("-c", "print('never')")),
    ]
    started = time.monotonic()
    found = gpu.run_cases(cases[:3], tmp_path, 60, {"SET": "seen"})
    assert time.monotonic() - started < 30
    assert list(found) == ["fails", "hangs", "works"] and found["works"] == "ok"
    assert found["fails"].startswith("failed with code 3") and found["hangs"] == "stopped after 5 s"
    assert not psutil.pid_exists(int((tmp_path / "rank").read_text()))
    assert (tmp_path / "works.jsonl").read_text() == "seen\n"
    assert gpu.run_cases(cases[3:], tmp_path, 1) == {"late": "left out: no time was left"}
    assert [line["outcome"] for line in lines_of(capfd.readouterr().out) if "outcome" in line][2] == "ok"


def test_every_case_runs_tiny_on_the_cpu(tmp_path):
    gpu = driver()
    own = [case for case in gpu.CASES if "benchmarks/_gpu_cases.py" in case.words]
    together = {case.words[2] for case in own if case.name not in THROUGH_THE_SCRIPT}
    assert together == {"step", "masks", "semi", "supports", "memory", "refit"}
    environment = {**os.environ, "PYTHON": sys.executable}
    options = ["--device", "cpu", "--tiny", "--folder", str(tmp_path), "--only", *THROUGH_THE_SCRIPT]
    done = subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + (tmp_path / "step_1b_zero3.log").read_text()[-2000:]
    assert {line["case"] for line in lines_of(done.stdout) if "outcome" in line} == set(THROUGH_THE_SCRIPT)
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
