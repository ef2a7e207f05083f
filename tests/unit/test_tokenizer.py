"""Tokenizers of sentencepiece files: read as sentencepiece reads them, exported complete, checked against the model."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaTokenizer

import dsee_scale
from dsee_scale.data import tokenizer as module
from dsee_scale.data.tokenizer import check_vocabulary, open_tokenizer
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import save_tokenizer
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import load_model, load_tokenizer
from tests.models import build, llama_config

spm = pytest.importorskip("sentencepiece")
WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "cast",
    "score",
    "is",
    "was",
    "fine",
    "great",
    "dull",
    "weak",
    "and",
    "very",
]
WORDS += ["not", "movie", "actor", "scene", "end", "good", "bad"]
TEXTS = ["the film is great", "a very weak plot", "great"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder whose only tokenizer file is a `tokenizer.model`."""
    path = tmp_path_factory.mktemp("llama")
    rng = random.Random(0)
    text = path.parent / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(300)))
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.parent / "pieces"),
        vocab_size=110,
        model_type="bpe",
        minloglevel=2,
    )
    (path.parent / "pieces.model").rename(path / "tokenizer.model")
    build(llama_config(vocab_size=110, hidden_size=40), torch.bfloat16).save_pretrained(path)  # type: ignore[operator]
    return path


def reads_as_sentencepiece(tokenizer, path: Path) -> None:
    pieces = spm.SentencePieceProcessor(model_file=str(path))
    assert len(tokenizer) == pieces.vocab_size()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_bare_sentencepiece_folder_is_read_as_sentencepiece_reads_it(folder):
    tokenizer = open_tokenizer(str(folder))
    reads_as_sentencepiece(tokenizer, folder / "tokenizer.model")
    assert tokenizer.pad_token == "</s>" and tokenizer.bos_token == "<s>"


def test_settings_in_the_folder_win(folder, tmp_path):
    there = Path(shutil.copytree(folder, tmp_path / "model"))
    (there / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert open_tokenizer(str(there))("great")["input_ids"][0] != 1
    named = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "pad_token": "<unk>"}
    (there / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = open_tokenizer(str(there))
    reads_as_sentencepiece(tokenizer, there / "tokenizer.model")
    assert tokenizer.pad_token == "<unk>"


def test_an_export_holds_the_sentencepiece_file_and_reads_alike(folder, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    reads_as_sentencepiece(AutoTokenizer.from_pretrained(tmp_path), folder / "tokenizer.model")
    model = load_model(ModelConfig(name=str(folder)), torch.bfloat16, tokenizer)
    dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=2, num_sparse=4))
    dsee_scale.export_model(model, tmp_path / "model", tokenizer=tokenizer)
    assert (tmp_path / "model" / "tokenizer.model").is_file()
    save_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "model"), tmp_path)  # and again from there


def test_the_three_token_trap_and_strangers_are_refused(folder):
    trap = LlamaTokenizer(vocab_file=str(folder / "tokenizer.model"))
    if len(trap) == 3:
        with pytest.raises(ConfigError, match=r"has 3 tokens, but the model .* knows 110.*silently gives 3"):
            load_model(ModelConfig(name=str(folder)), torch.bfloat16, trap)
    fitting = open_tokenizer(str(folder))
    for words in (110, 120):
        check_vocabulary(fitting, words, "m")
    with pytest.raises(ConfigError, match=r"has 110 tokens, but the model 'm' knows 109; use the tokenizer"):
        check_vocabulary(fitting, 109, "m")
    with pytest.raises(
        ConfigError, match=r"has 110 tokens, but the model 'm' knows 128: it belongs to another"
    ):
        check_vocabulary(fitting, 128, "m")


def test_missing_packages_are_named(folder, monkeypatch):
    def fails(*args, **kwargs):
        raise ImportError("needs tiktoken")

    monkeypatch.setattr(module.LlamaTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(module, "_importable", lambda name: name == "sentencepiece")
    with pytest.raises(
        ConfigError, match=r"tokenizer.model needs protobuf: pip install 'dsee_scale\[train\]'"
    ):
        open_tokenizer(str(folder))


def test_a_real_vocabulary_of_32000_pieces(tmp_path):
    """DSEE_TEST_SENTENCEPIECE names a Llama-style tokenizer.model, e.g. of the package mistral-common."""
    path = os.environ.get("DSEE_TEST_SENTENCEPIECE", "")
    if not Path(path).is_file():
        pytest.skip("DSEE_TEST_SENTENCEPIECE names no file")
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    tokenizer = open_tokenizer(str(tmp_path))
    assert len(tokenizer) == 32_000
    reads_as_sentencepiece(tokenizer, tmp_path / "tokenizer.model")
