"""The check of an export in stock transformers: what it needs of memory, and what it makes of having too little."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsee_scale.errors import FormatError
from dsee_scale.evaluation import stock_check
from dsee_scale.evaluation.export_check import StockCheck
from tests.models import build, llama_config

LONG = {"prompt": list(range(1, 31)), "answers": [[5], [6]]}
ROWS = [LONG, {"prompt": [3, 4], "answers": [[7], [8]]}, {**LONG, "prompt": list(range(30, 60))}, LONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build(llama_config(vocab_size=97)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(path)
    return path


def request(folder, **changes):
    values = {"folder": str(folder), "trust_remote_code": False, "dtype": "float32", "device": "cpu"}
    return values | {"batch_size": 4, "rows": ROWS, "texts": ["w3"]} | changes


@pytest.mark.parametrize("answers", [[[5], [6]], [[5, 9], [6]], [list(range(2, 40))]])
def test_logits_are_made_for_few_positions_at_a_time(folder, tmp_path, monkeypatch, answers):
    """A batch of long prompts times a large vocabulary would take more memory than the model."""
    rows = [{**row, "answers": answers} for row in ROWS]
    seen, most = [], 2 * 30 * 97
    monkeypatch.setattr(stock_check, "MOST_LOGITS", most)
    original = stock_check.log_softmax
    monkeypatch.setattr(stock_check, "log_softmax", lambda x: seen.append(x.numel()) or original(x))
    (tmp_path / "request").write_text(json.dumps(request(folder, rows=rows)))
    stock_check.main(str(tmp_path / "request"), str(tmp_path / "answer"))
    found = json.loads((tmp_path / "answer").read_text())["nll"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, values in zip(rows, found, strict=True):
        for answer, value in zip(row["answers"], values, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["prompt"] + answer])).logits[0]
            log_p = logits.log_softmax(-1)[len(row["prompt"]) - 1 : -1]
            expected = -log_p.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert value == pytest.approx(expected, rel=1e-5)
    assert max(seen) <= 20 * 97 and len(seen) >= 4


def test_a_check_that_is_killed_for_its_memory_is_no_broken_export(folder, caplog):
    check = StockCheck(request(folder))
    os.kill(check._process.pid, signal.SIGKILL)
    assert check.ended(60) and check.answer() is None
    assert "was not checked" in caplog.text and "memory" in caplog.text
    check.close()


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError: CUDA out of memory", "OSError: no file"])
def test_only_a_lack_of_memory_is_passed_over(folder, monkeypatch, tmp_path, error):
    program = tmp_path / "program.py"
    program.write_text(f"raise SystemExit({error!r})")
    monkeypatch.setattr(stock_check, "__file__", str(program))
    check = StockCheck(request(folder))
    assert check.ended(60)
    if "OutOfMemory" in error:
        assert check.answer() is None
    else:
        with pytest.raises(FormatError, match="no file"):
            check.answer()
    check.close()
