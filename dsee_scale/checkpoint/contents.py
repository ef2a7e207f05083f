"""What a saved folder of each kind may hold, by exact names, and so what an overwrite may delete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsee_scale.checkpoint.files import MANIFEST, read_json, sha256
from dsee_scale.errors import ConfigError, FormatError

_PARTS = r"(-\d{5}-of-\d{5})?\.safetensors"
_ADAPTER = rf"dsee_(manifest|config)\.json|dsee_(adapter|masks){_PARTS}"
OWN_NAMES = {
    "adapter": _ADAPTER,
    "training_state": rf"{_ADAPTER}|dsee_state\.json|dsee_(optimizer|random){_PARTS}",
    "export": r"dsee_(manifest|export|structure)\.json",
}
"""Names that no one else gives to files: they go even where they are damaged, so that a damaged checkpoint is never in
the way of a new one."""
MODEL_NAMES = (
    rf"model{_PARTS}|model\.safetensors\.index\.json|(config|generation_config)\.json|adapter/({_ADAPTER})|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|"
    r"(pre)?processor_config\.json|(video_)?preprocessor_config\.json|(LICENSE|NOTICE|USE_POLICY|README)(\.(md|txt))?|"
    r"(configuration|modeling|tokenization)_\w+\.py"
)
"""Other files of an exported model: they go only where they are what was written."""


def is_model_file(name: str) -> bool:
    """Whether transformers may read a file of this name from a model's folder."""
    return re.fullmatch(MODEL_NAMES, name) is not None


def check_output(folder: Path, kind: str, overwrite: bool) -> None:
    """Refuse a target that is not empty, or whose replacement would delete what was not written by us.

    Raises:
        ConfigError: see the message.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output folder {folder} is not empty; choose another one or pass overwrite=True")
    try:
        manifest = read_json(folder / MANIFEST)
    except FormatError:
        manifest = {}
    if manifest.get("format", kind) != kind:
        raise ConfigError(
            f"output folder {folder} holds a saved {manifest['format']}, which a new {kind} must not replace; choose "
            "another folder"
        )
    foreign = _foreign(folder, kind, manifest.get("files"))
    if foreign:
        raise ConfigError(
            f"output folder {folder} holds files that dsee_scale did not write, or that were changed since "
            f"({', '.join(foreign[:5])}); overwriting would delete them: move them or choose another folder"
        )


def reject_input(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is an input, or holds one.

    Raises:
        ConfigError: naming both.
    """
    target = Path(os.path.realpath(output))
    for each in inputs:
        source = Path(os.path.realpath(each)) if each else None
        if source is not None and source.exists() and target in (source, *source.parents):
            raise ConfigError(
                f"output {output} is, or holds, the input {each}; writing it would delete what is read: choose "
                "another folder"
            )


def _foreign(folder: Path, kind: str, listed: Any) -> list[str]:
    """Names of all that an overwrite must not delete; looks into folders within."""
    listed = listed if isinstance(listed, Mapping) else {}
    own = OWN_NAMES.get(kind, "|".join(OWN_NAMES.values()))
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found.append(name)
        elif path.is_dir():
            if kind != "export" or name != "adapter":
                found.append(name)
        elif not (re.fullmatch(own, name) or _as_written(path, name, kind, listed.get(name))):
            found.append(name)
    return found


def _as_written(path: Path, name: str, kind: str, record: Any) -> bool:
    return (
        kind == "export"
        and is_model_file(name)
        and isinstance(record, Mapping)
        and record.get("size") == path.stat().st_size
        and record.get("sha256") == sha256(path)
    )
