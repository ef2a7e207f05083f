"""`launch/finetune.py` and `dsee-scale run` under their launchers: the same recipe gives the same losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.dist.run_inputs import losses, tiny_recipe, write_inputs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)
LAUNCHES = {
    "deepspeed": ("launch/single_node.sh launch/finetune.py", "zero3_cpu"),
    "accelerate": ("accelerate launch --config_file ds_configs/accelerate_cpu.yaml -m dsee_scale run", None),
    "deepspeed --module": ("launch/single_node.sh --module dsee_scale run", "zero3_cpu"),
    "torchrun -m": ("launch/torchrun.sh -m dsee_scale run", "zero3_cpu"),
}


def launch(name: str, folder: Path) -> Path:
    """One whole run in fresh processes; its output folder."""
    command, deepspeed = LAUNCHES[name]
    output = folder / name
    recipe = tiny_recipe(folder, output, training__save_strategy="no", export=None)
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
    assert len(found["deepspeed"]) == 11
    assert all(values == found["deepspeed"] for values in found.values())
