"""`launch/finetune.py` and `dsee-scale run` under their launchers: the same recipe gives the same losses."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.dist.run_inputs import losses, tiny_recipe, write_inputs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)
LAUNCHES = {
    "accelerate": ("accelerate launch --config_file ds_configs/accelerate_cpu.yaml -m dsee_scale run", None),
    "deepspeed --module": ("launch/single_node.sh --module dsee_scale run", "zero3_cpu"),
    "torchrun": ("launch/torchrun.sh launch/finetune.py", "zero3_cpu"),
}


def launch(name: str, folder: Path) -> Path:
    """One whole run in fresh processes; its output folder."""
    command, deepspeed = LAUNCHES[name]
    output = folder / name
    short = {"training__max_steps": 2, "retune": {"max_steps": 1}}
    recipe = tiny_recipe(folder, output, training__save_strategy="no", export=None, **short)
    recipe["training"]["deepspeed"] = deepspeed
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    run = subprocess.run(
        [*command.split(), str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return output


def test_every_launcher_gives_the_same_losses(tmp_path):
    write_inputs(tmp_path)
    found = {name: losses(launch(name, tmp_path)) for name in LAUNCHES}
    assert len(found["torchrun"]) == 3
    assert all(values == found["torchrun"] for values in found.values())


ENDS = """import os, sys, time
print("a rank is here", os.getpid(), flush=True)
sys.exit(75) if sys.argv[1:] == ["75"] else time.sleep(300)
"""
"""A rank that ends as a run does which may be relaunched, or that is still at work."""


def alive(pids: list[int], seconds: float) -> list[int]:
    """Which of the processes are still there, once they had time to end."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_what_launchers_make_of_a_ranks_code(tmp_path):
    """DeepSpeed's hands a failed rank's code on, torchrun makes it 1. SIGTERM to the group, as schedulers send it, ends
    torchrun with 1 and DeepSpeed's front, which has no handler on one machine, by the signal; no rank is left.
    """
    program = tmp_path / "ends.py"
    program.write_text(ENDS)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "NUM_PROCESSES": "1",
    }
    started = {}
    for launcher in ("single_node.sh", "torchrun.sh"):
        for word in ("75", "wait"):
            started[launcher, word] = subprocess.Popen(
                [f"launch/{launcher}", str(program), word],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
    codes, ranks = {}, []
    try:
        for (launcher, word), process in started.items():
            assert process.stdout is not None
            while word == "wait" and "a rank is here" not in (line := process.stdout.readline()):
                assert line, f"{launcher} ended early"
            if word == "wait":
                ranks.append(int(line.split()[-1]))
                os.killpg(process.pid, signal.SIGTERM)
            codes[launcher, word] = process.wait(timeout=120)
    finally:
        for process in started.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert codes == {
        ("single_node.sh", "75"): 75,
        ("single_node.sh", "wait"): -signal.SIGTERM,
        ("torchrun.sh", "75"): 1,
        ("torchrun.sh", "wait"): 1,
    }
    assert len(ranks) == 2 and not alive(ranks, seconds=30)
