"""GLUE runs under real ZeRO-3 and real launchers, against one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from dsee_scale.errors import ConfigError, RunStoppedError
from paper.glue.arguments import parse_flags
from paper.glue.run import _checkpoint, run_glue
from tests.dist.pool import free_port
from tests.paper.glue_inputs import SHORT, deepspeed_file, results, write_encoder, write_files

ROOT = Path(__file__).parents[2]
STAGE = "--apply_lora --apply_sparse --num_sparse 5"
PRUNED = f"{STAGE} --prune_mode ABS --pruning_ratio 0.2 --ad_pruning_ratio 0.2 --export_delta masked"
HEADS = f"{STAGE} --prune_mode ABS --prune_heads_num 3"


def both_stages(folder: str, where: str, words: list[str]) -> dict:
    """Tune, then prune and retune in both ways; the numbers of all three."""
    base, tuned, found = Path(folder), f"{where}/tuned", {}
    for name, start, stage in (("tuned", "bert", STAGE), ("pruned", tuned, PRUNED), ("heads", tuned, HEADS)):
        output = base / where / name
        flags = f"--model_name_or_path {base / start} --output_dir {output} {SHORT} {stage}".split()
        run_glue(parse_flags([*flags, "--do_predict", *words]))
        found[name] = results(output)
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_encoder(folder / "bert")
    return folder, ["--task_name", "sst2", *write_files(folder)]


def test_two_ranks_under_zero3_do_what_one_process_does(pools, inputs):
    folder, words = inputs
    one = both_stages(str(folder), "one", [*words, "--lr_scheduler_type", "constant"])
    shared = [*words, "--lr_scheduler_type", "constant", *deepspeed_file(folder)]
    shared += ["--per_device_train_batch_size", "4"]
    two = pools(2).run(both_stages, str(folder), "two", shared, timeout=240)[0]
    for name in one:
        for key in ("trained_in_updates", "trained_in_full", "block_weights_zero", "eval_accuracy"):
            assert two[name][key] == one[name][key], (name, key)
        assert two[name]["eval_loss"] == pytest.approx(one[name]["eval_loss"], abs=0.02)
        files = [(folder / where / name / "predict_results_sst2.txt").read_text() for where in ("one", "two")]
        assert files[0] == files[1]
    weights = load_file(folder / "two" / "pruned" / "model" / "model.safetensors")
    zeros = sum(int((w == 0).sum()) for n, w in weights.items() if "encoder" in n and w.dim() == 2)
    assert zeros == two["pruned"]["block_weights_zero"] > 0


def left_alone(folder: str, words: list[str]) -> str:
    """Rank 1 sleeps through a training step; what the others say."""
    step = Trainer.training_step

    def late_step(*args, **kwargs):
        if torch.distributed.get_rank() == 1:
            time.sleep(12)
        return step(*args, **kwargs)

    flags = f"--model_name_or_path {folder}/bert --output_dir {folder}/alone {SHORT} {STAGE} --ddp_timeout 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", late_step)
        try:
            run_glue(parse_flags([*flags.split(), *words]))
        except RunStoppedError as error:
            return str(error)
    return "no error"


def test_a_rank_that_is_lost_is_noticed_and_the_error_names_the_phase(pools, inputs):
    folder, words = inputs
    try:
        said = pools(2).run(left_alone, str(folder), [*words, *deepspeed_file(folder)])
    finally:
        pools(2).stop()  # its process groups are broken
    assert "rank 0 lost another rank during 'training, step 1'" in said[0]
    assert "ddp_timeout (4 s); the same command without --overwrite_output_dir goes on" in said[0]


def predict_into(folder: str, words: list[str]) -> str:
    flags = f"--model_name_or_path {folder}/bert --output_dir {folder}/full --do_predict --ddp_timeout 20"
    try:
        run_glue(parse_flags([*flags.split(), *words]))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_predictions_that_cannot_be_written_are_one_error_on_all_ranks(pools, inputs):
    folder, words = inputs
    (folder / "full" / "predict_results_sst2.txt.part").mkdir(parents=True)
    found = pools(2).run(predict_into, str(folder), words)
    assert found[0] == found[1] and "predict_results_sst2.txt failed: IsADirectoryError" in found[0]


def chosen(folders: list[str]) -> str:
    """What this rank goes on from, where each rank sees another output folder."""
    output = folders[torch.distributed.get_rank()]
    settings = parse_flags(
        f"--model_name_or_path m --task_name sst2 --do_train --output_dir {output}".split()
    )
    return str(_checkpoint(settings, SimpleNamespace(do_train=True, output_dir=output), None))  # type: ignore


def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_sees(pools, tmp_path):
    newest, empty = tmp_path / "full" / "checkpoint-20", tmp_path / "empty"
    empty.mkdir()
    for folder in (newest, tmp_path / "full" / "checkpoint-3"):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    folders = [str(newest.parent), str(empty)]
    assert pools(2).run(chosen, folders) == [str(newest)] * 2
    assert pools(2).run(chosen, [str(empty), str(empty)]) == ["None"] * 2


def test_the_program_runs_under_torchrun_without_deepspeed(inputs, tmp_path):
    folder, words = inputs
    start = f"torchrun --nproc_per_node 2 --master_port {free_port()} paper/run_glue.py"
    flags = f"--model_name_or_path {folder / 'bert'} --output_dir {tmp_path / 'out'} {STAGE} --do_train --do_eval "
    flags += "--max_steps 2 --per_device_train_batch_size 4 --evaluation_strategy steps --eval_steps 1 --save_steps 1 "
    flags += "--load_best_model_at_end True --metric_for_best_model eval_accuracy"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [*start.split(), *flags.split(), *words]
    assert shutil.which(command[0], path=path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert results(tmp_path / "out")["trained_in_updates"] == 2 * 2 * (4 * (48 + 48) + 5)
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and (
        tmp_path / "out" / "model" / "config.json"
    ).is_file()
