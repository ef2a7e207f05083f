"""The command line: the repository's flags and old names, with their meaning."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dsee_scale.errors import ConfigError
from paper.glue.arguments import parse_flags
from paper.glue.old_flags import RENAMED, WITHOUT_EFFECT, modern_words

README_COMMAND = """
    --save_total_limit 10 --model_name_or_path bert-base-uncased --task_name sst2 --output_dir OUT --do_train --do_eval
    --num_train_epochs 3 --save_steps 50 --seed 1 --per_device_train_batch_size 8 --per_device_eval_batch_size 8
    --max_seq_length 128 --overwrite_output_dir --logging_steps 50 --load_best_model_at_end True
    --metric_for_best_model eval_accuracy --apply_lora --lora_r 16 --apply_sparse --num_sparse 64 --learning_rate 2e-4
    --evaluation_strategy steps
"""
LEAST = ["--model_name_or_path", "m", "--task_name", "sst2", "--output_dir", "o", "--do_train"]


def test_the_readme_command_is_understood():
    found = parse_flags(shlex.split(README_COMMAND))
    assert (found.model.apply_lora, found.model.lora_r, found.model.lora_alpha) == (True, 16, 32)
    assert (found.model.apply_sparse, found.model.num_sparse, found.model.sparse_method) == (
        True,
        64,
        "grebsmo",
    )
    assert found.data.task_name == "sst2" and found.data.overwrite_output_dir and found.data.pad_to_max_length
    assert found.training["eval_strategy"] == "steps"
    assert found.training["load_best_model_at_end"] is True
    assert (found.training["save_total_limit"], found.training["learning_rate"]) == (10, 2e-4)
    assert not found.pruning.prunes


def test_every_command_of_the_docs_is_understood():
    text = (Path(__file__).parents[2] / "docs" / "paper.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if " paper/run_glue.py " in line and "--do_train" in line]
    assert len(commands) >= 3
    stages = [parse_flags(shlex.split(line.split("paper/run_glue.py")[1])) for line in commands]
    assert [stage.pruning.prunes for stage in stages] == [False, False, True]


def test_defaults_are_the_repositorys():
    found = parse_flags(LEAST)
    assert (found.model.lora_r, found.model.lora_alpha, found.model.num_sparse) == (4, 32, 128)
    assert found.pruning.prune_mode == "WABS" and not found.pruning.prunes
    assert found.training == {"output_dir": "o", "do_train": True}


def test_old_names_get_their_new_meaning():
    words = (
        "--evaluation_strategy=epoch --no_cuda --per_gpu_train_batch_size 2 --warmup_ratio 0.1 --adafactor"
    )
    words += " --fp16_opt_level O1 --logging_dir x --save_safetensors False --group_by_length --local_rank=1"
    found = parse_flags([*LEAST, *words.split()]).training
    assert found["eval_strategy"] == "epoch" and found["use_cpu"] is True and found["warmup_steps"] == 0.1
    assert found["per_device_train_batch_size"] == 2 and found["optim"] == "adafactor"
    assert found["train_sampling_strategy"] == "group_by_length"
    assert not {"logging_dir", "local_rank", "save_safetensors"} & found.keys()


def test_every_old_name_is_gone_from_transformers():
    import dataclasses

    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)} - {"local_rank"}
    assert not names & (RENAMED.keys() | WITHOUT_EFFECT.keys())


def test_flags_may_come_from_a_json_file(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "evaluation_strategy": "no", "do_train": True}))
    words = modern_words([str(path)])
    assert words == ["--model_name_or_path", "m", "--eval_strategy", "no", "--do_train", "true"]


def test_a_list_in_a_json_file_becomes_one_word_for_each_element(tmp_path):
    path = tmp_path / "flags.json"
    flags = {"model_name_or_path": "m", "task_name": "sst2", "output_dir": "o", "do_train": True}
    path.write_text(json.dumps({**flags, "lora_target_modules": ["query", "value"]}))
    assert parse_flags([str(path)]).model.lora_target_modules == ["query", "value"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task_name", "sst3"], "sst3.*valid: cola"),
        (["--sharded_ddp", "simple"], "sharded_ddp.*--deepspeed"),
        (["--self_pruning_ratio", "0.3"], "--prune_heads_num"),
        (["--pruning_ratio", "1.2"], r"pruning_ratio must lie in \[0, 1\)"),
        (["--prune_heads_num", "-1"], "at least 0"),
        (["--train_file", "a.csv", "--do_eval"], "--do_eval needs --validation_file"),
        (["--train_file", "a.csv", "--dataset_name", "d"], "not both"),
        (["--lora_r", "0"], "--lora_r must be at least 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_flags([*LEAST, *words])


def test_something_must_be_asked_for():
    with pytest.raises(ConfigError, match=r"no data.*nothing to do.*--output_dir is missing"):
        parse_flags(["--model_name_or_path", "m"])
