"""What the docs print is run: Python blocks, recipes and commands, on models of a few thousand weights."""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsee_scale.cli import main
from tests.models import build, llama_config
from tests.unit.test_chat import MARKED
from tests.unit.test_imports import ORDER

ROOT = Path(__file__).parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
LAUNCHED = {"deepspeed_loop.md"}
"""Run under ZeRO-3 by tests/dist/test_readme.py."""
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs" / "tutorials").glob("*.md")) if p.name not in LAUNCHED),
]


EXIT_CODES = {
    ("all", "0"): ("dist/test_faults.py", "test_twenty_random_kills_of_a_rank_cost_nothing_but_time"),
    ("`dsee-scale run`, each rank", "2"): (
        "dist/test_exit_codes.py",
        "test_what_must_be_changed_first_is_2_and_the_same_words_on_every_rank",
    ),
    ("`dsee-scale run`, each rank", "75"): (
        "dist/test_exit_codes.py",
        "test_sigterm_outside_of_training_is_75_on_every_rank",
    ),
    ("`dsee-scale inspect`, `export`, `push`, `eval`, `plan`", "1"): (
        "unit/test_cli.py",
        "test_errors_are_one_line_without_traceback",
    ),
    ("`dsee-scale inspect`, `export`, `push`, `eval`, `plan`", "2"): (
        "unit/test_cli.py",
        "test_wrong_usage_is_2_and_ctrl_c_is_130",
    ),
    ("`dsee-scale inspect`, `export`, `push`, `eval`, `plan`", "130"): (
        "unit/test_cli.py",
        "test_wrong_usage_is_2_and_ctrl_c_is_130",
    ),
}
"""What shows each row of docs/reference/exit_codes.md."""


def test_every_row_of_the_exit_codes_has_a_test():
    rows, program = [], ""
    for line in (ROOT / "docs" / "reference" / "exit_codes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].isdigit():
            program = cells[0] or program
            rows.append((program, cells[1]))
    assert rows == list(EXIT_CODES)
    for file, test in EXIT_CODES.values():
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def write_model(folder: Path) -> None:
    """A Llama with a tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "Review: the film plot cast score scene end is great warm bright fine dull weak cold flat . "
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([text + "Sentiment: positive negative"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = MARKED
    fast.save_pretrained(folder)
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    ids = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None)
    build(llama_config(vocab_size=len(fast), **sizes, **ids), torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_page_prints_runs(page, tmp_path, monkeypatch):
    if page.name == "nf4.md":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    names: dict = {}
    ran = 0
    for language, title, text in BLOCK.findall(page.read_text()):
        text = text.replace(MODEL, str(tmp_path / "model"))
        if title:
            Path(title).write_text(text)
        elif language == "python" and page.name == "README.md":  # as printed, in a Python of its own
            subprocess.run([sys.executable, "-c", text], check=True)
            ran += 1
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
            ran += 1
        elif language == "bash":
            for line in text.splitlines():
                program, *words = shlex.split(line)
                if words[0] == "run":  # the check starts a Python of its own, and is tested in tests/dist
                    words += ["--export.check", "false"]
                assert program == "dsee-scale" and main(words) == 0, line
    assert ran, f"{page.name} has no Python block"


def test_the_guides_name_every_tutorial():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
    assert len(pages) > 15 and [page for page in pages if page not in nav] == []


def test_the_architecture_lists_the_layers_in_their_order():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text.split("## From a recipe")[0], flags=re.MULTILINE)
    listed = [
        name.removesuffix("/").removesuffix(".py") for row in rows for name in re.findall(r"`(.*?)`", row)
    ]
    assert listed == [name for name in ORDER if not name.startswith("__")]


def test_the_architecture_names_files_that_are_there():
    named = re.findall(r"`([a-z_]+/[a-z0-9_/]+)(?:\.py)?`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 30
    for name in named:
        found = (ROOT / "dsee_scale" / f"{name}.py", ROOT / f"{name}.py")
        assert any(path.is_file() for path in found), name


def test_no_link_between_files_is_dead():
    """Where the repository is read; the site's own are checked when it is built."""
    pages = [
        *ROOT.glob("*.md"),
        *(p for name in ("docs", "launch", "ds_configs") for p in (ROOT / name).rglob("*.md")),
    ]
    links = [
        (page.relative_to(ROOT), target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert len(pages) > 20 and not links


def test_the_quality_page_is_what_the_script_prints_of_the_kept_cells(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _quality_report

    _quality_report.print_tables(ROOT / "benchmarks" / "quality_cells")
    assert capsys.readouterr().out == (ROOT / "docs" / "quality.md").read_text()


QUALITY = {
    "sentiment, accuracy (loss)": "sentiment",
    "E2E, loss in nats per token": "e2e",
    "text, perplexity": "text",
}
"""How the header of a table of docs/benchmarks.md begins -> the folder of the cells that it is about."""


def test_the_tables_of_quality_are_rows_of_the_kept_cells(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from _quality_report import METRIC, kept_cells

    checked = 0
    job: str | None = None
    known: list[list[list[float]]] = []
    for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines():
        if not line.startswith("|"):
            job = None
        if not line.startswith("|") or line.startswith("| ---"):
            continue
        cells = [cell.strip(" *") for cell in line.replace("**", "").strip("|").split("|")]
        named = [folder for start, folder in QUALITY.items() if cells[0].strip().startswith(start)]
        if named and "retuned" in line:
            job, phases = named[0], [cell.strip() for cell in cells if cell.strip() in PHASES]
            rows = [*kept_cells(CELLS / job).values(), *kept_cells(CELLS / "norms_trained" / job).values()]
            known = [[means(found, phase, METRIC[job]) for phase in phases] for found in rows]
            continue
        if job is not None:
            stated = [numbers(cell) for cell in cells[1 : 1 + len(known[0])]]
            assert any(all(map(agree, stated, row)) for row in known), f"no cells of {job} give: {line}"
            checked += 1
    assert checked > 40


CELLS = ROOT / "benchmarks" / "quality_cells"
PHASES = ("tuned", "pruned", "retuned", "exported")


def means(found: list[dict[str, Any]], phase: str, metric: str) -> list[float]:
    """Mean and deviation of a row's metric after a phase; nothing where the phase doesn't occur."""
    values = [cell[phase][metric] for cell in found if phase in cell]
    return (
        [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])] if values else []
    )


def numbers(cell: str) -> list[str]:
    """A mean and its deviation as they are written; what stands in brackets is another metric."""
    return re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)", "", cell))


def agree(stated: list[str], found: list[float]) -> bool:
    return len(stated) == len(found) and all(
        f"{value:.{len(text.partition('.')[2])}f}" == text for text, value in zip(stated, found, strict=True)
    )
