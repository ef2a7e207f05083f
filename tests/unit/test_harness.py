"""`dsee-scale eval`: lm-eval's tasks over local files say what our own evaluation says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset

import dsee_scale
from dsee_scale import DSEEConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.data.encoding import IGNORED, Encoder
from dsee_scale.data.tokenizer import open_tokenizer
from dsee_scale.evaluation.evaluate import EvaluationSet, evaluate
from dsee_scale.export.export import export_model
from dsee_scale.export.lora import export_lora
from dsee_scale.recipe.sections import DataConfig
from tests.dist.run_inputs import write_inputs
from tests.unit.test_cli import tune

pytest.importorskip("lm_eval")
LENGTH = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its adapter and exports of it, and two tasks over local files."""
    folder = tmp_path_factory.mktemp("harness")
    write_inputs(folder)
    model = dsee_scale.load_pretrained(folder / "model")
    model.get_input_embeddings().weight.data *= 20  # logits that differ
    model.save_pretrained(folder / "model")
    tokenizer = open_tokenizer(str(folder / "model"))
    tune(model, DSEEConfig(rank=3, num_sparse=5, support="magnitude"), mask_update=False)
    save_adapter(model, folder / "adapter")
    export_model(model, folder / "separate", delta="separate", tokenizer=tokenizer)
    export_lora(model, folder / "lora", tokenizer=tokenizer)
    export_model(model, folder / "dense", delta="dense", tokenizer=tokenizer)
    rows = [row["text"] for row in read_rows(folder)]
    documents = [" ".join(rows[i::3]) for i in range(3)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    local = dict(dataset_path="json", test_split="test")
    perplexity = dict(
        task="words",
        dataset_kwargs={"data_files": {"test": str(folder / "text.jsonl")}},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        **local,
    )
    choice = dict(
        task="reviews",
        dataset_kwargs={"data_files": {"test": str(folder / "validation.csv")}},
        output_type="multiple_choice",
        doc_to_text="Review : {{text}} Sentiment :",
        doc_to_choice=["positive", "negative"],
        doc_to_target="label",
        metric_list=[{"metric": "acc"}],
        **{**local, "dataset_path": "csv"},
    )
    for task in (perplexity, choice):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def read_rows(folder: Path):
    return load_dataset("csv", data_files=str(folder / "validation.csv"), split="train")


def windows(tokenizer, text: str) -> list[tuple[list[int], list[int]]]:
    """A document in windows, each token predicted once; the last window is full, its first tokens without a label."""
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    found = []
    for start in range(1, len(ids), LENGTH):
        stop = min(start + LENGTH, len(ids))
        seen = ids[max(0, stop - LENGTH - 1) : stop]
        found.append((seen, [IGNORED] * (len(seen) - (stop - start)) + ids[start:stop]))
    return found


def ours(folder: Path) -> tuple[float, float]:
    """Word perplexity and accuracy by `evaluate`, of the export in stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    tokenizer = open_tokenizer(str(folder / "dense"))
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    answers = [row for text in texts for row in windows(tokenizer, text)]
    assert len(answers) > 2 * len(texts)
    settings = DataConfig(
        task="classification",
        train_file="unused.csv",
        prompt="Review : {text} Sentiment :",
        labels={"positive": " positive", "negative": " negative"},
        max_length=48,
    )
    choices = Encoder(tokenizer, settings).choices(read_rows(folder))
    run = dict(batch_size=4, device=torch.device("cpu"))
    nll = evaluate(model, model, EvaluationSet(answers=answers), **run).nll
    accuracy = evaluate(model, model, EvaluationSet(choices=choices), **run).metrics()["accuracy"]
    return math.exp(nll / sum(len(text.split()) for text in texts)), accuracy


@pytest.mark.parametrize("kind", ["dense", "separate", "adapter", "lora"])
def test_its_tasks_say_what_our_own_evaluation_says(folders, capsys, kind):
    tasks = [str(folders / "words.yaml"), str(folders / "reviews.yaml")]
    base = ["--base", str(folders / "model")] if kind == "adapter" else []
    command = ["eval", str(folders / kind), "--tasks", *tasks, "--length", str(LENGTH), "--batch", "4", *base]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("{") :])
    perplexity, accuracy = ours(folders)
    assert found["length"] == LENGTH
    assert found["results"]["words"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert found["results"]["reviews"]["acc,none"] == pytest.approx(accuracy)
    if kind == "dense":
        assert main(command) == 0
        table = capsys.readouterr().out
        assert f"word_perplexity@{LENGTH}|" in table and "|acc " in table
        assert f"sequence length: {LENGTH} tokens at most" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "absent.yaml"], "no task file absent.yaml"),
        (["--tasks", "TASK", "--length", "65"], "--length 65 must lie in [2, 64]"),
        (["--tasks", "TASK", "--base", "x"], "leave out --base"),
        (["--tasks", "no_such_task"], "lm-eval knows no task 'no_such_task'"),
    ],
)
def test_what_makes_no_sense_is_refused(folders, capsys, monkeypatch, words, message):
    # Reading lm-eval's own 10,000 task files takes half a minute.
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, paths: {})
    words = [str(folders / "words.yaml") if word == "TASK" else word for word in words]
    assert main(["eval", str(folders / "dense"), *words]) == 1
    assert message in capsys.readouterr().err
