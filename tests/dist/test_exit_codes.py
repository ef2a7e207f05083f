"""The table of exit codes in docs/resume.md, on two ranks; crashes and a lost number are in test_faults.py."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.dist.fresh_ranks import Fault, launch, logs
from tests.dist.test_faults import RELAUNCH, write_recipe

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("case", ["output", "weights", "settings", "pruning"])
def test_what_must_be_changed_first_is_2_and_the_same_words_on_every_rank(inputs, tmp_path, case):
    flags = {
        "output": ["--output_dir", "/proc/no/such"],
        "weights": ["--model.name", str(tmp_path / "model")],
        "settings": ["--learning_rate", ".nan"],
        "pruning": ["--prune.modules", "[nope]"],
    }
    if case == "weights":
        weights = Path(shutil.copytree(inputs / "model", tmp_path / "model")) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    recipe = write_recipe(inputs, tmp_path)
    assert launch(recipe, *flags[case]) == [2, 2], logs(recipe)
    said = [Path(f"{recipe}.log.{rank}").read_text() for rank in range(2)]
    errors = [[line for line in text.splitlines() if "Error: " in line] for text in said]
    assert len(errors[0]) == 1 and errors[0][0].partition("] ")[2] == errors[1][0].partition("] ")[2]
    assert "Traceback" not in "".join(said) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_before_training_is_75_on_every_rank(inputs, tmp_path, rank):
    recipe = write_recipe(inputs, tmp_path)
    codes = launch(recipe, fault=Fault("decompose", 1, rank=rank, signal=signal.SIGTERM))
    assert codes == [RELAUNCH, RELAUNCH], logs(recipe)
    assert "told to stop by SIGTERM" in logs(recipe) and "Traceback" not in logs(recipe)
    assert not (tmp_path / "run").exists() or sorted(path.name for path in (tmp_path / "run").iterdir()) in (
        [],
        ["recipe.yaml"],
    )
