"""Data to text: the challenges' files in, the scorers' files out, texts in the prompts' order."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dsee_scale.errors import ConfigError
from dsee_scale.evaluation.evaluate import corpus_bleu, generate_texts
from paper.scorer_files import write_scorer_files
from paper.triples import main, read_triples
from tests.dist.run_inputs import write_inputs
from tests.models import build, llama_config

ROOT = Path(__file__).parents[2]
WEBNLG = """<?xml version="1.0"?><benchmark><entries>
<entry category="Airport" eid="Id1" size="2"><originaltripleset><otriple>a | b | c</otriple></originaltripleset>
<modifiedtripleset><mtriple>Aarhus_Airport | cityServed | "Aarhus, Denmark"</mtriple>
<mtriple>Aarhus_Airport | runwayLength | 2776.0</mtriple></modifiedtripleset>
<lex comment="good" lid="Id1">Aarhus Airport serves Aarhus.</lex>
<lex comment="good" lid="Id2"> Its runway is long. </lex>
<lex comment="" lid="Id3"></lex></entry></entries></benchmark>"""
DART = [
    {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "North Carolina"]],
        "annotations": [{"source": "WikiSQL", "text": "Mars Hill joined in 1973."}],
    }
]


def test_webnlg_and_dart_become_rows(tmp_path):
    (tmp_path / "1triples").mkdir()
    (tmp_path / "1triples" / "airport.xml").write_text(WEBNLG)
    (tmp_path / "dart.json").write_text(json.dumps(DART))
    airport = 'Aarhus Airport : cityServed : "Aarhus, Denmark" | Aarhus Airport : runwayLength : 2776.0'
    assert read_triples([tmp_path / "1triples"]) == [
        (airport, "Aarhus Airport serves Aarhus.", "Airport"),
        (airport, "Its runway is long.", "Airport"),
    ]
    assert main([str(tmp_path / "out" / "dart.csv"), str(tmp_path / "dart.json")]) == 0
    with (tmp_path / "out" / "dart.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["triples"] == "Mars Hill : JOINED : 1973 | Mars Hill : LOCATION : North Carolina"
    assert rows[0]["text"] == "Mars Hill joined in 1973."


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    with pytest.raises(ConfigError, match=r"a\.json is neither WebNLG's XML nor DART's JSON"):
        read_triples([tmp_path / "a.json"])
    with pytest.raises(ConfigError, match="does not exist"):
        read_triples([tmp_path / "b.xml"])


def test_the_scorers_files(tmp_path):
    texts, references = ["the cat\nsat", "a dog"], [["the cat sat", "a cat sat there"], ["a dog ran"]]
    metrics = write_scorer_files(tmp_path / "out", ["p1", "p2"], texts, references)
    assert (tmp_path / "out" / "hypotheses.txt").read_text() == "the cat sat\na dog\n"
    assert (
        tmp_path / "out" / "references.txt"
    ).read_text() == "the cat sat\na cat sat there\n\na dog ran\n\n"
    assert (tmp_path / "out" / "reference0").read_text() == "the cat sat\na dog ran\n"
    assert (tmp_path / "out" / "reference1").read_text() == "a cat sat there\n\n"
    rows = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert rows[1] == {"prompt": "p2", "hypothesis": "a dog", "references": ["a dog ran"]}
    assert metrics["bleu"] == corpus_bleu(["the cat sat", "a dog"], references)


class Digits:
    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row) for row in rows]


def test_batched_beams_are_those_of_each_prompt_alone_and_in_order():
    model = build(llama_config(pad_token_id=0, bos_token_id=None, eos_token_id=96)).eval()
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]
    arguments = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.8}
    found = generate_texts(
        model, Digits, prompts, arguments, pad_id=0, batch_size=3, device=torch.device("cpu")
    )
    alone = [
        generate_texts(model, Digits, [p], arguments, pad_id=0, batch_size=1, device=torch.device("cpu"))[0]
        for p in prompts
    ]
    assert found == alone and len(set(found)) > 1


def program():
    spec = importlib.util.spec_from_file_location("run_generation", ROOT / "paper" / "run_generation.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_each_process_takes_its_own_gpu_before_the_group_is_made(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: done.append(backend))
    for name, value in {"LOCAL_RANK": "3", "RANK": "11", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    words = ["--model", "m", "--data_file", "nowhere.csv", "--output_dir", "o"]
    assert program().main(words) == 2
    assert done == ["cuda:3", "nccl"]


def test_the_program_writes_texts_of_a_model_folder(tmp_path, capsys):
    write_inputs(tmp_path)
    (tmp_path / "test.csv").write_text(
        "subject,ref\nfilm,the film is great\nplot,the plot is flat\nfilm,fine\n"
    )
    run_generation = program()
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--data_file",
        str(tmp_path / "test.csv"),
        "--prompt",
        "the {subject} is",
    ]
    flags += [
        "--completion",
        " {ref}",
        "--output_dir",
        str(tmp_path / "out"),
        "--num_beams",
        "2",
        "--max_new_tokens",
        "4",
    ]
    assert run_generation.main(flags) == 0
    assert "on 2 prompts" in capsys.readouterr().out
    assert (
        tmp_path / "out" / "references.txt"
    ).read_text() == "the film is great\nfine\n\nthe plot is flat\n\n"
    assert len((tmp_path / "out" / "hypotheses.txt").read_text().splitlines()) == 2
    flags[5] = "the {object} is"
    assert run_generation.main(flags) == 2
