"""The table of exit codes, docs/reference/exit_codes.md, on two ranks; crashes are in test_faults.py."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dsee_scale import distributed
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import export_model
from dsee_scale.training import run as training
from dsee_scale.training.survival import limited_waiting
from tests.dist.fresh_ranks import Fault, launch, logs
from tests.dist.test_faults import RELAUNCH, write_recipe
from tests.models import build, llama_config

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


@pytest.mark.parametrize(
    ("place", "rank"), [("load", 0), ("decompose", 1), ("export", 1), ("export", 0), ("check", 0)]
)
def test_sigterm_outside_of_training_is_75_on_every_rank(inputs, tmp_path, place, rank):
    """Before the first step nothing is left behind; after the last one the same command ends the run."""
    short = {"training__max_steps": 1, "retune": {"max_steps": 1}}
    recipe = write_recipe(inputs, tmp_path, export={"delta": "masked"}, **short)
    codes = launch(recipe, fault=Fault(place, 1, rank=rank, signal=signal.SIGTERM))
    assert codes == [RELAUNCH, RELAUNCH], logs(recipe)
    assert "stopped by SIGTERM" in logs(recipe) and "Traceback" not in logs(recipe)
    output = tmp_path / "run"
    left = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if place in ("load", "decompose"):
        assert left in ([], ["recipe.yaml"])
    else:
        assert {"adapter", "checkpoint-2"} <= set(left) and not [name for name in left if "partial" in name]
    if place == "check":
        assert launch(recipe, "--resume", "auto") == [0, 0], logs(recipe)
        assert (output / "model" / "config.json").exists() and (output / "metrics.json").exists()


def exported_on_a_full_disk(folder: str) -> str:
    """Rank 0 may write the config and no more of the tokenizer than fits."""
    words = {f"word{index}": index for index in range(3000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0"))
    )
    model = build(llama_config())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if torch.distributed.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            export_model(model, folder, delta="none", tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    return str(caught.value)


def test_a_disk_that_fills_up_while_the_tokenizer_is_saved_is_one_error_and_leaves_nothing(pools, tmp_path):
    found = pools(2).run(exported_on_a_full_disk, str(tmp_path / "out"))
    assert found[0] == found[1] and "writing config and tokenizer failed" in found[0]
    assert "File too large" in found[0] and not list(tmp_path.iterdir())


def push_slowly(refused: bool) -> str:
    """An upload that takes longer than a collective may wait; what each rank is told."""

    def push(folder: Path, repo: str) -> str:
        time.sleep(3)
        if refused:
            raise ConfigError("the hub refuses")
        return "an address"

    before, training.push_to_hub = training.push_to_hub, push
    often, distributed.MEETING = distributed.MEETING, 0.2
    try:
        with limited_waiting(1.5):
            training._push(Path("out"), "me/out", torch.device("cpu"))
        return "pushed"
    except ConfigError as error:
        return str(error)
    finally:
        training.push_to_hub, distributed.MEETING = before, often
        with limited_waiting(1800):  # the pool's own
            pass


@pytest.mark.parametrize("refused", [False, True])
def test_an_upload_may_take_longer_than_the_ranks_may_wait_for_each_other(pools, refused):
    assert pools(2).run(push_slowly, refused) == ["the hub refuses" if refused else "pushed"] * 2
