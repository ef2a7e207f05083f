"""Tokenizers by name, those of a bare sentencepiece file included, checked before any training."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from dsee_scale.errors import ConfigError
from dsee_scale.pretrained import hub_note, hub_options

SENTENCEPIECE_FILE = "tokenizer.model"
LEAST_COVERED = 0.9
"""Share of a model's vocabulary that its tokenizer must know: some models pad theirs by a few percent."""


def open_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, with a padding token. Local.

    transformers 5 reads a folder that holds a `tokenizer.model` and nothing that names a class by a generic
    class, which splits the first word otherwise than sentencepiece does, and without `<s>`; such a folder is
    read as what it is, a Llama tokenizer. The padding token, where there is none, is the end-of-text token:
    padding is masked and has no label, so the end of a text is still learned.

    Raises:
        ConfigError: it does not load, or knows less than its sentencepiece file.
    """
    folder = Path(name)
    bare = _is_bare(folder)
    options |= hub_options(name)
    try:
        if bare:
            tokenizer: Any = LlamaTokenizer.from_pretrained(
                name, **{"add_bos_token": True, **bare[0]}, **options
            )
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"tokenizer {name!r} does not load: {error}{hub_note(name)}{_missing_packages(folder)}"
        ) from error
    _reject_fewer_pieces(tokenizer, folder, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, words: int, model: str) -> None:
    """Refuse a tokenizer that does not fit a model's vocabulary. Local.

    Args:
        tokenizer: the tokenizer.
        words: entries of the model's embedding.
        model: names it in errors.

    Raises:
        ConfigError: it has more tokens than the model, or far fewer.
    """
    found = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    where = f"tokenizer {tokenizer.name_or_path!r} has {found:,} tokens"
    if found > words:
        raise ConfigError(
            f"{where}, but the model {model!r} knows {words:,}; use the tokenizer that belongs to it"
        )
    if found < LEAST_COVERED * words:
        raise ConfigError(
            f"{where}, but the model {model!r} knows {words:,}: it belongs to another model, or its files were not "
            "read (LlamaTokenizer(vocab_file=...) silently gives 3 tokens in transformers 5; from_pretrained of the "
            "folder reads them)"
        )


def _is_bare(folder: Path) -> list[dict[str, Any]]:
    """The folder's own settings in a list of one, if a sentencepiece file is all that says how to tokenize."""
    if not (folder / SENTENCEPIECE_FILE).is_file() or (folder / "tokenizer.json").is_file():
        return []
    settings, config = (_json(folder / file) for file in ("tokenizer_config.json", "config.json"))
    llama = config.get("model_type", "llama") in ("llama", "mistral", "mixtral")
    if settings.get("tokenizer_class") or not llama:
        return []
    return [{"add_bos_token": settings["add_bos_token"]} if "add_bos_token" in settings else {}]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _missing_packages(folder: Path) -> str:
    """The way out where a sentencepiece file meets a Python without its readers."""
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in needed.items() if not _importable(module)]
    if not (folder / SENTENCEPIECE_FILE).is_file() or not missing:
        return ""
    return f". {SENTENCEPIECE_FILE} needs {' and '.join(missing)}: pip install 'dsee_scale[train]'"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there
        return False


def _reject_fewer_pieces(tokenizer: Any, folder: Path, name: str) -> None:
    path = folder / SENTENCEPIECE_FILE
    if not path.is_file() or not _importable("sentencepiece"):
        return
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError):
        return  # other formats bear this name too, tiktoken's for one
    if len(tokenizer) < pieces:
        raise ConfigError(
            f"tokenizer {name!r} was read with {len(tokenizer):,} tokens, and {path} has {pieces:,} pieces; its "
            "tokenizer_config.json names another class or file: correct or remove it"
        )
