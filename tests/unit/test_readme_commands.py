"""The README's shell commands run as printed, with folders in place of the words in capitals."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dsee_scale.cli import main
from tests.fake_hub import running_hub
from tests.unit.test_harness import folders  # noqa: F401

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = re.findall(r"^dsee-scale (.*)$", README, flags=re.MULTILINE)
SHOWS = {
    "inspect": "50.0",
    "export": "50.00% of the",
    "eval": "word_perplexity",
    "push": "/me/tuned/commit/",
    "plan": "8 GPUs",
}


def test_every_command_is_shown():
    assert [line.split()[0] for line in COMMANDS] == list(SHOWS)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[0])
def test_a_command_of_the_readme_runs(line, folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = {
        "FOLDER": folders / "dense",
        "ADAPTER": folders / "adapter",
        "BASE": folders / "model",
        "OUT": tmp_path / "out",
        "OWNER/NAME": "me/tuned",
        "wikitext": folders / "words.yaml",
        "task.yaml": folders / "reviews.yaml",
    }
    words = [str(names.get(word, word)) for word in shlex.split(line, comments=True)]
    with running_hub(monkeypatch) if words[0] == "push" else monkeypatch.context():
        assert main(words) == 0
    assert SHOWS[words[0]] in capsys.readouterr().out
