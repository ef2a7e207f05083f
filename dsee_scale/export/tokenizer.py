"""A tokenizer with all of its files: transformers 5 leaves the sentencepiece file out, which other programs read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SENTENCEPIECE_FILE = "tokenizer.model"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer (or a processor) and the sentencepiece file that it was read from. Local.

    Args:
        tokenizer: anything with `save_pretrained`.
        folder: an existing folder.
    """
    tokenizer.save_pretrained(str(folder))
    origin = getattr(tokenizer, "name_or_path", None)
    sources = [getattr(tokenizer, "vocab_file", None), origin and Path(origin) / SENTENCEPIECE_FILE]
    for source in (Path(path) for path in sources if path):
        if source.name == SENTENCEPIECE_FILE and source.is_file():
            shutil.copyfile(source, folder / SENTENCEPIECE_FILE)
            return
