"""`dsee-scale plan` against what a training step allocates, counted in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize("case", ["bf16, under the mask", "nf4", "bf16, offloaded", "experts, bf16"])
def test_the_planned_memory_of_a_training_step_is_within_15_percent(case):
    command = [sys.executable, str(BENCHMARK), "--json", "--quick", "--ours-only", "--case", case]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["metric"] == "peak memory" and found["ours"] > 50e6
    assert found["plan_over_measured"] == pytest.approx(1.0, abs=0.15), found
