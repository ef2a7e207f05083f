"""Saved folders as files: read bounded, strict and with one error, for they may be anyone's; put in place whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dsee_scale.errors import ConfigError, DSEEError, FormatError

MANIFEST = "dsee_manifest.json"
LONGEST_JSON = 256 << 20
LONGEST_NAME = 500
DEEPEST = 64
LARGEST = 2**63
_CHUNK = 1 << 22


@contextlib.contextmanager
def damaged(where: object) -> Iterator[None]:
    """Local. Whatever goes wrong while something from a file is given its meaning is a FormatError of one line."""
    try:
        yield
    except DSEEError as error:
        if not isinstance(error, ConfigError):
            raise
        raise FormatError(f"{where} is damaged: {error}; use another copy of it") from error
    except Exception as error:
        what = (
            f"key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        )
        raise FormatError(
            f"{where} is damaged: {' '.join(what.split())[:300]}; use another copy of it"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: the file is missing, truncated, too large or deep, no JSON object; or it holds a key twice, a
            number that is not finite, or a name that no one gives.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_JSON + 1)
        if len(text) > LONGEST_JSON:
            raise ValueError(f"longer than {LONGEST_JSON:,} bytes")
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
        _check_bounds(value, 0)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FormatError(f"{path} is damaged: not valid JSON ({reason}); use another copy") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def is_inside(name: Any) -> bool:
    """Whether a name from a file is a path that stays in its folder."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[^/\\\0]{1,200}(/[^/\\\0]{1,200})?", name) is not None
        and not {".", ".."} & set(name.split("/"))
    )


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _check_bounds(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        longest = max(map(len, value), default=0)
        if longest > LONGEST_NAME:
            raise ValueError(f"a name of {longest:,} characters")
    elif (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and abs(value) > LARGEST
    ):
        raise ValueError(f"the number {str(value)[:30]}")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_bounds(each, depth + 1)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what was there is moved aside first and deleted last, or put back."""
    previous = folder.with_name(f".{folder.name}.previous")
    replaced = folder.exists()
    if replaced:
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    try:
        os.rename(new, folder)
    except OSError:
        if replaced:
            os.rename(previous, folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has what a folder lists."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
