"""`dsee-scale eval`: lm-eval's tasks over local files say what our own evaluation says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, BertConfig

import dsee_scale
from dsee_scale import DSEEConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.data.encoding import IGNORED, Encoder
from dsee_scale.data.tokenizer import open_tokenizer
from dsee_scale.errors import ConfigError
from dsee_scale.evaluation.evaluate import EvaluationSet, evaluate
from dsee_scale.evaluation.harness import evaluate_tasks
from dsee_scale.export.export import export_model
from dsee_scale.export.lora import export_lora
from dsee_scale.recipe.sections import DataConfig
from tests.dist.run_inputs import write_inputs
from tests.models import build, gpt2_config
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


def test_bfloat16_logits_are_scored_in_float32(folders, tmp_path):
    """As our own evaluation does; log-probabilities in bfloat16 are off by up to 2^-8 of their size."""
    model = dsee_scale.load_pretrained(folders / "dense", dtype=torch.bfloat16)
    tokenizer = open_tokenizer(str(folders / "dense"))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "narrow")
    texts = [json.loads(line)["text"] for line in (folders / "text.jsonl").read_text().splitlines()]
    nll = 0.0
    for ids, labels in (row for text in texts for row in windows(tokenizer, text)):
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]])).logits.float().log_softmax(-1)[0]
        nll -= sum(log_p[at, label].item() for at, label in enumerate(labels[1:]) if label != IGNORED)
    report = evaluate_tasks(tmp_path / "narrow", [str(folders / "words.yaml")], length=LENGTH, device="cpu")
    expected = math.exp(nll / sum(len(text.split()) for text in texts))
    assert report.results["words"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "absent.yaml"], "no task file absent.yaml"),
        (["--tasks", "TASK", "--length", "65"], "--length 65 must lie in [2, 64]"),
        (["--tasks", "TASK", "--base", "x"], "leave out --base"),
        (["--tasks", "no_such_task"], "lm-eval knows no task 'no_such_task'"),
        (["--tasks", "TASK", "--batch", "0"], "batch size (--batch) must be at least 1, found 0"),
        (["--tasks", "TASK", "--limit", "0"], "limit (--limit) must be at least 1, found 0"),
        (["--tasks", "TASK", "--limit", "-1"], "limit (--limit) must be at least 1, found -1"),
    ],
)
def test_what_makes_no_sense_is_refused(folders, capsys, monkeypatch, words, message):
    # Reading lm-eval's own 10,000 task files takes half a minute.
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, paths: {})
    words = [str(folders / "words.yaml") if word == "TASK" else word for word in words]
    assert main(["eval", str(folders / "dense"), *words]) == 1
    assert message in capsys.readouterr().err


NO_TASKS = {
    "syntax": ("a: [1", "is not valid YAML: while parsing a flow sequence"),
    "bytes": ("task: \x81", "is not valid YAML"),
    "list": ("- task", "names no task"),
    "empty": ("", "names no task"),
    "unnamed": ("dataset_path: json", "names no task; expected a mapping with `task: NAME`"),
}


@pytest.mark.parametrize("name", list(NO_TASKS))
def test_what_is_no_task_file_is_refused_before_the_model_is_loaded(
    folders, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr("dsee_scale.evaluation.harness.load_folder", lambda *_: pytest.fail("loaded"))
    text, cause = NO_TASKS[name]
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    assert main(["eval", str(folders / "dense"), "--tasks", str(tmp_path / "bad.yaml")]) == 1
    text = capsys.readouterr().err
    assert (
        text.startswith(f"dsee-scale eval: task file {tmp_path / 'bad.yaml'} {cause}")
        and text.count("\n") == 1
    )


BAD_TASKS = {
    "keys": ("task: x", "TypeError"),
    "unknown": ("task: x\nno_such_key: 1", "no_such_key"),
    "file": ({"dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}, "absent.jsonl"),
    "column": ({"doc_to_target": "{{nocol}}"}, "'nocol' is undefined"),
    "function": ("task: x\nprocess_docs: !function absent.function", "absent"),
}


@pytest.mark.parametrize("name", list(BAD_TASKS))
def test_what_lm_eval_says_of_a_bad_task_is_one_line_that_names_its_file(folders, tmp_path, capsys, name):
    change, cause = BAD_TASKS[name]
    if isinstance(change, dict):
        change = yaml.safe_dump({**yaml.safe_load((folders / "words.yaml").read_text()), **change})
    (tmp_path / "bad.yaml").write_text(change)
    tasks = [str(folders / "words.yaml"), str(tmp_path / "bad.yaml")]
    assert main(["eval", str(folders / "dense"), "--tasks", *tasks]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsee-scale eval: ")]
    assert len(lines) == 1 and f"cannot run task {tmp_path / 'bad.yaml'}: " in lines[0] and cause in lines[0]


def test_a_row_that_a_task_cannot_use_names_the_task(folders, tmp_path):
    """One that only lm-eval's run comes to: the first row is sound."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a good film"}\n{"text": "bad"}\n')
    task = yaml.safe_load((folders / "words.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "rows.jsonl")
    (tmp_path / "late.yaml").write_text(yaml.safe_dump({**task, "doc_to_target": "{{text.split()[2]}}"}))
    with pytest.raises(ConfigError, match=r"late\.yaml: UndefinedError"):
        evaluate_tasks(folders / "dense", [str(tmp_path / "late.yaml")], device="cpu")


def test_an_error_of_the_model_keeps_its_traceback(folders, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("lm_eval.simple_evaluate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate_tasks(folders / "dense", [str(folders / "words.yaml")], device="cpu")


def test_an_error_without_a_file_name_is_printed_without_an_empty_one(monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("Unable to find it")

    monkeypatch.setattr("dsee_scale.evaluation.harness.evaluate_tasks", fail)
    assert main(["eval", "folder", "--tasks", "t"]) == 1
    assert capsys.readouterr().err == "dsee-scale eval: Unable to find it\n"


def test_a_folder_without_a_tokenizer_gives_no_number(folders, tmp_path, capsys):
    """transformers makes a tokenizer of one token for some models whose files lack it."""
    export_model(build(gpt2_config()), tmp_path / "gpt2")
    assert main(["eval", str(tmp_path / "gpt2"), "--tasks", str(folders / "words.yaml")]) == 1
    assert f"has 1 tokens, but the model '{tmp_path / 'gpt2'}' knows 97" in capsys.readouterr().err


def test_what_is_no_decoder_is_refused_before_a_task_runs(folders, tmp_path, capsys):
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=97
    )
    AutoModelForSequenceClassification.from_config(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    assert main(["eval", str(tmp_path / "bert"), "--tasks", str(folders / "words.yaml")]) == 1
    assert "holds a BertForSequenceClassification; lm-eval's tasks need a causal" in capsys.readouterr().err
