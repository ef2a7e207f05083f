"""Whole GLUE runs on one process: every encoder, both second stages, regression, prediction files, bad input."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

import paper.glue.run as glue_run
from dsee_scale import load_pretrained
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.training.journal import Journal
from dsee_scale.training.survival import report_lost_rank
from paper.glue.arguments import parse_flags
from paper.glue.run import run_glue
from tests.paper.glue_inputs import (
    ENCODERS,
    SHORT,
    pairs,
    results,
    sentences,
    write_encoder,
    write_files,
    write_rows,
)

ADAPTED_ENTRIES, OTHER_ENTRIES = 2 * 2 * 48 * 48, 2 * (2 * 48 * 48 + 2 * 48 * 66)


def run(model: Path, output: Path, *more: str, flags: str = SHORT) -> dict:
    run_glue(
        parse_flags(["--model_name_or_path", str(model), "--output_dir", str(output), *flags.split(), *more])
    )
    return results(output)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_encoder(folder / "bert")
    return folder, ["--task_name", "sst2", *write_files(folder)]


@pytest.fixture(scope="module")
def tuned(inputs):
    """The first stage, on BERT."""
    folder, data = inputs
    found = run(folder / "bert", folder / "tuned", *data, "--do_predict", "--apply_lora", "--apply_sparse",
                "--num_sparse", "5")  # fmt: skip
    return folder / "tuned", data, found


def accuracy_in_stock(folder: Path) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return accuracy(model, AutoTokenizer.from_pretrained(folder))


def accuracy(model, tokenizer) -> float:
    rows = sentences(18, 48)
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch).logits.argmax(dim=1).tolist()
    return float(
        np.mean([model.config.id2label[i] == row["label"] for i, row in zip(found, rows, strict=True)])
    )


def test_the_first_stage_learns_and_counts_as_the_paper_does(tuned):
    output, _, found = tuned
    assert found["eval_accuracy"] == 1.0
    assert found["trained_in_updates"] == 2 * 2 * (3 * (48 + 48) + 5)
    assert found["trained_in_full"] == 48 * 2 + 2
    assert found["block_weights_zero"] == 0
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-30"}
    assert not list(output.glob("*.safetensors")), "the frozen base was written"


def test_the_export_has_the_same_accuracy_in_stock_transformers(tuned):
    output, _, found = tuned
    assert accuracy_in_stock(output / "model") == found["eval_accuracy"]


def test_predictions_are_written_as_the_repository_does(tuned):
    lines = (tuned[0] / "predict_results_sst2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    expected = [row["label"] for row in sentences(6, 100)]
    assert lines[1:] == [f"{i}\t{label}" for i, label in enumerate(expected)]


def test_the_unstructured_second_stage_removes_exactly_its_shares(tuned, tmp_path):
    output, data, _ = tuned
    stage = ["--apply_lora", "--apply_sparse", "--num_sparse", "5", "--prune_mode", "ABS"]
    stage += ["--pruning_ratio", "0.2", "--ad_pruning_ratio", "0.3", "--export_delta", "masked"]
    found = run(output, tmp_path / "out", *data, *stage)
    # The encoder's frozen pooler is in the second pool, as in the repository.
    removed = round(0.3 * ADAPTED_ENTRIES), round(0.2 * (OTHER_ENTRIES + 48 * 48))
    weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").state_dict()
    zeros = {n: int((w == 0).sum()) for n, w in weights.items() if w.dim() == 2 and "embeddings" not in n}
    adapted = sum(count for name, count in zeros.items() if "query" in name or "value" in name)
    assert (adapted, sum(zeros.values()) - adapted - zeros["classifier.weight"]) == removed
    assert found["block_weights_zero"] == sum(removed) - zeros["bert.pooler.dense.weight"]
    assert found["eval_accuracy"] > 0.9


def test_the_structured_second_stage_takes_heads_out_of_every_layer(tuned, tmp_path):
    output, data, _ = tuned
    found = run(output, tmp_path / "out", *data, "--prune_mode", "ABS", "--prune_heads_num", "3")
    model = load_pretrained(tmp_path / "out" / "model")
    for layer in model.bert.encoder.layer:
        assert layer.attention.self.query.weight.shape == (36, 48)
        assert layer.attention.output.dense.weight.shape == (48, 36)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert accuracy(model, tokenizer) == found["eval_accuracy"] > 0.9


def test_a_tuned_folder_is_evaluated_without_its_flags_and_data(tuned, tmp_path):
    output, data, trained = tuned
    again = run(output, tmp_path / "a", *data, flags="--do_eval --disable_tqdm True")
    assert again["eval_accuracy"] == trained["eval_accuracy"] and again["eval_loss"] == pytest.approx(
        trained["eval_loss"]
    )
    flags = f"--do_predict --disable_tqdm True --test_file {data[-1]}"
    run_glue(
        parse_flags(
            ["--model_name_or_path", str(output), "--output_dir", str(tmp_path / "b"), *flags.split()]
        )
    )
    found = (tmp_path / "b" / "predict_results_None.txt").read_text()
    assert found == (output / "predict_results_sst2.txt").read_text()


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "bert"])
def test_every_encoder_is_tuned_and_pruned(kind, inputs, tmp_path):
    _, data = inputs
    model = write_encoder(tmp_path / kind, kind)
    stage = ["--apply_lora", "--apply_sparse", "--num_sparse", "5"]
    flags = SHORT.replace("2e-2", "5e-3").replace("--max_steps 30", "--max_steps 60")
    found = run(model, tmp_path / "tuned", *data, *stage, flags=flags)
    assert found["trained_in_updates"] == 2 * 2 * (3 * (48 + 48) + 5)
    head = 48 * 48 + 48 + 48 * 2 + 2  # a dense layer and the output
    assert found["trained_in_full"] == head
    assert found["eval_accuracy"] > 0.9
    assert accuracy_in_stock(tmp_path / "tuned" / "model") == found["eval_accuracy"]
    stage += ["--prune_mode", "WABS", "--pruning_ratio", "0.2", "--ad_pruning_ratio", "0.2"]
    pruned = run(tmp_path / "tuned", tmp_path / "pruned", *data, *stage)
    assert pruned["block_sparsity"] == pytest.approx(0.2, abs=1e-3)
    assert accuracy_in_stock(tmp_path / "pruned" / "model") == pruned["eval_accuracy"]


def test_lora_alone_and_all_weights(inputs, tmp_path):
    folder, data = inputs
    found = run(folder / "bert", tmp_path / "lora", *data, "--apply_lora")
    assert found["trained_in_updates"] == 2 * 2 * 3 * (48 + 48)
    flags = SHORT.replace("2e-2", "2e-3")
    found = run(folder / "bert", tmp_path / "full", *data, flags=flags)
    assert found["trained_in_full"] > ADAPTED_ENTRIES + OTHER_ENTRIES and found["eval_accuracy"] > 0.9
    assert accuracy_in_stock(tmp_path / "full") == found["eval_accuracy"]


@pytest.mark.parametrize("adapters", [[], ["--apply_lora"]])
def test_accumulated_batches_give_the_gradient_of_one_large_batch(adapters, inputs, tmp_path):
    """A classifier's loss is its batch's mean, though its forward takes the Trainer's number of items."""
    folder, data = inputs
    steps = (
        "--do_train --max_steps 2 --save_strategy no --report_to none --disable_tqdm True --logging_steps 1"
    )
    for size, count in ((8, 1), (2, 4)):
        more = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(count)]
        more += ["--train_sampling_strategy", "sequential", *adapters]
        run(folder / "bert", tmp_path / str(count), *data, *more, flags=steps)
    found = [json.loads((tmp_path / count / "trainer_state.json").read_text()) for count in ("1", "4")]
    first, second = ([entry["grad_norm"] for entry in state["log_history"][:2]] for state in found)
    assert second == pytest.approx(first, rel=1e-3)


def test_mixed_precision_keeps_float32_weights_without_deepspeed(inputs, tmp_path):
    """Updates of 1e-4 would be lost in bfloat16 weights."""
    folder, data = inputs
    found = run(folder / "bert", tmp_path / "out", *data, "--apply_lora", "--bf16", "True")
    assert found["eval_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert model.dtype == torch.float32


def test_regression_on_json_files(inputs, tmp_path):
    folder, _ = inputs
    data = ["--task_name", "stsb", *write_files(tmp_path, pairs, "json")]
    flags = SHORT.replace("accuracy", "pearson")
    found = run(folder / "bert", tmp_path / "out", *data, "--do_predict", "--apply_lora", flags=flags)
    assert found["eval_pearson"] > 0.8
    assert found["eval_combined_score"] == pytest.approx(
        (found["eval_pearson"] + found["eval_spearmanr"]) / 2
    )
    lines = (tmp_path / "out" / "predict_results_stsb.txt").read_text().splitlines()[1:]
    values = [float(line.split("\t")[1]) for line in lines]
    assert all(len(line.rsplit(".", 1)[1]) == 3 for line in lines)
    assert np.mean(values[::2]) > np.mean(values[1::2])


def test_files_without_a_task_and_numbers_for_classes(inputs, tmp_path):
    folder, _ = inputs
    rows = [
        {"text": row["sentence"], "label": 7 if row["label"] == "positive" else 3} for row in sentences(48)
    ]
    data = ["--train_file", write_rows(tmp_path / "t.csv", rows), "--validation_file",
            write_rows(tmp_path / "v.csv", rows[:9])]  # fmt: skip
    found = run(folder / "bert", tmp_path / "out", *data, "--apply_lora", "--pad_to_max_length", "False")
    assert found["eval_accuracy"] == 1.0
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").config
    assert config.id2label == {0: "3", 1: "7"}


def test_a_stopped_run_goes_on_and_an_overwritten_one_starts_afresh(inputs, tmp_path):
    folder, data = inputs
    lora = ["--apply_lora", "--apply_sparse", "--num_sparse", "5"]
    whole = run(folder / "bert", tmp_path / "whole", *data, *lora)
    flags = SHORT.replace("--max_steps 30", "--max_steps 15 --lr_scheduler_type constant")
    run(folder / "bert", tmp_path / "cut", *data, *lora, flags=flags)
    flags = SHORT + " --lr_scheduler_type constant"
    same = run(folder / "bert", tmp_path / "same", *data, *lora, flags=flags)
    gone_on = run(folder / "bert", tmp_path / "cut", *data, *lora, flags=flags)
    assert gone_on["eval_loss"] == same["eval_loss"]
    again = run(folder / "bert", tmp_path / "cut", *data, *lora, "--overwrite_output_dir")
    assert again["eval_loss"] == whole["eval_loss"]


def test_a_stopped_run_of_all_weights_goes_on_past_a_checkpoint_that_was_cut_off(inputs, tmp_path):
    folder, data = inputs
    flags = (
        "--do_train --do_eval --save_steps 2 --per_device_train_batch_size 8 --disable_tqdm True --seed 1 "
    )
    flags += "--lr_scheduler_type constant --max_steps "
    same = run(folder / "bert", tmp_path / "same", *data, flags=flags + "4")
    run(folder / "bert", tmp_path / "cut", *data, flags=flags + "2")
    (tmp_path / "cut" / "checkpoint-3").mkdir()
    written = (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    gone_on = run(folder / "bert", tmp_path / "cut", *data, flags=flags + "4")
    assert gone_on["eval_loss"] == same["eval_loss"]
    assert (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == written
    words = f"--resume_from_checkpoint {tmp_path}/cut/checkpoint-4"
    with pytest.raises(ConfigError, match=r"holds no adapter.*--model_name_or_path"):
        run(folder / "bert", tmp_path / "out", *data, flags=f"--do_eval {words}")
    with pytest.raises(FormatError, match=r"dsee_manifest\.json"):
        run(folder / "bert", tmp_path / "out", *data, flags=f"--do_train --apply_lora {words}")


@pytest.mark.parametrize("adapters", [["--apply_lora"], []])
def test_messages_know_the_step_of_a_healthy_run(adapters, inputs, tmp_path, monkeypatch):
    folder, data = inputs
    journal, step, said = Journal(), Trainer.training_step, []

    def noted(*args, **kwargs):
        said.append(journal.doing)
        return step(*args, **kwargs)

    monkeypatch.setattr(glue_run, "Journal", lambda: journal)
    monkeypatch.setattr(Trainer, "training_step", noted)
    flags = "--do_train --do_eval --max_steps 2 --save_steps 2 --eval_strategy steps --eval_steps 1"
    run(folder / "bert", tmp_path / "out", *data, *adapters, flags=flags)
    assert said == ["training, step 1", "training, step 2"]


def test_evaluation_and_prediction_are_followed_too(inputs, tmp_path):
    journal = Journal()
    progress = glue_run.Progress(journal)
    journal.doing = "evaluation"
    for batch in (1, 2):
        progress.on_prediction_step(None, None, None)
        assert journal.doing == f"evaluation, batch {batch}"
    progress.on_evaluate(None, None, None)
    assert journal.doing == "evaluation"


def test_one_process_waits_for_none_and_needs_no_reporter():
    threads = threading.active_count()
    with report_lost_rank(Journal(), 10.0):
        assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            "--apply_lora --pruning_ratio 0.2 --prune_mode ABS",
            ConfigError,
            "ABS reads an update.*--prune_mode W",
        ),
        ("--pruning_ratio 0.2 --prune_mode W", ConfigError, "add --apply_lora"),
        ("--apply_sparse", ConfigError, "goes with --apply_lora"),
        ("--apply_lora --prune_mode W --prune_heads_num 12", ConfigError, "removes 12 of 12 heads"),
        ("--apply_lora --task_name mrpc", ConfigError, "no column 'sentence1'.*sentence, label.*'mrpc'"),
        ("--apply_lora --task_name rte", ConfigError, "no column 'sentence1'"),
        ("--apply_lora --model_name_or_path nowhere/at_all", ConfigError, "does not load"),
        ("--apply_lora --lora_path .", ConfigError, "holds no adapter"),
        ("--apply_lora --lora_target_modules qkv", TargetError, "matches no module"),
        ("--apply_lora --lr_scheduler_type reduce_lr_on_plateau", ConfigError, "lr_scheduler_type"),
    ],
)
def test_bad_input_says_what_to_do(words, error, message, inputs, tmp_path):
    folder, data = inputs
    with pytest.raises(error, match=message):
        run(folder / "bert", tmp_path / "out", *data, *words.split())


def test_a_tuned_model_refuses_other_settings_and_other_classes(tuned, inputs, tmp_path):
    output, data, _ = tuned
    with pytest.raises(ConfigError, match="--lora_r 4, there 3"):
        run(output, tmp_path / "out", *data, "--lora_r", "4")
    rows = [
        {"sentence": row["sentence"], "label": label}
        for row, label in zip(sentences(9), "abc" * 3, strict=True)
    ]
    files = [write_rows(tmp_path / f"{name}.csv", rows) for name in "tv"]
    with pytest.raises(ConfigError, match="tuned for classes negative, positive; the data hold a, b, c"):
        run(output, tmp_path / "out", "--train_file", files[0], "--validation_file", files[1])


def test_without_a_hub_the_error_names_the_local_flags(inputs, tmp_path, monkeypatch):
    folder, _ = inputs
    monkeypatch.setattr("paper.glue.data.GLUE", str(tmp_path / "no_hub"))
    with pytest.raises(
        ConfigError, match="columns sentence, label: --train_file TRAIN --validation_file DEV"
    ):
        run(folder / "bert", tmp_path / "out", "--task_name", "sst2", "--apply_lora")
