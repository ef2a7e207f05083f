"""Reading single files of saved folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dsee_scale.errors import FormatError

MANIFEST = "dsee_manifest.json"
_CHUNK = 1 << 22


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: the file is missing, truncated, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path} is damaged: no valid JSON ({error}); use another copy") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
