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
    "export": r"dsee_(manifest|export|structure)\.json|dsee_quality\.png",
    "lora": r"dsee_manifest\.json",
}
"""Names that no one else gives to files: they go even where they are damaged, so that a damaged checkpoint is never in
the way of a new one."""
MODEL_NAMES = (
    rf"model{_PARTS}|model\.safetensors\.index\.json|(config|generation_config)\.json|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|"
    r"(pre)?processor_config\.json|(video_)?preprocessor_config\.json|(LICENSE|NOTICE|USE_POLICY|README)(\.(md|txt))?|"
    r"(configuration|modeling|tokenization)_\w+\.py"
)
"""Other files of an exported model: they go only where they are what was written."""
TEMPLATES = "additional_chat_templates"
"""Folder of an exported model in which transformers saves a tokenizer's chat templates beyond the first."""
FOLDERS_WITHIN = {"export": {"adapter": "adapter"}, "lora": {"base": "export"}}
"""Kinds of saved folders that lie in others, by name."""
OTHER_NAMES = {"export": MODEL_NAMES, "lora": r"adapter_config\.json|adapter_model\.safetensors|README\.md"}


ALSO_READ = r"adapter_config\.json|(adapter_model|pytorch_model)\b.*|.*\.py"
"""What transformers would read besides, if someone laid it into an exported model's folder."""


def unlisted(folder: Path, listed: Iterable[str]) -> list[str]:
    """Files that would be read with a model, but that its manifest does not list. Local."""
    known = set(listed)
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in known and re.fullmatch(f"{MODEL_NAMES}|{ALSO_READ}", path.name)
    ]


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
        raise ConfigError(
            f"output folder {folder} is not empty; choose another one, or overwrite it (overwrite=True, --overwrite)"
        )
    manifest = _manifest(folder)
    if manifest.get("format", kind) != kind:
        raise ConfigError(
            f"output folder {folder} holds a saved {manifest['format']}, which a new {kind} must not replace; choose "
            "another folder"
        )
    foreign = _foreign(folder, kind)
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


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / MANIFEST)
    except FormatError:
        return {}


def _foreign(folder: Path, kind: str) -> list[str]:
    """Names of all that an overwrite must not delete; looks into the folders within that belong there."""
    listed = _manifest(folder).get("files")
    found = []
    for path in sorted(folder.iterdir()):
        inner = FOLDERS_WITHIN.get(kind, {}).get(path.name)
        if path.is_dir() and not path.is_symlink() and inner:
            found += [f"{path.name}/{name}" for name in _foreign(path, inner)]
        elif path.is_dir() and not path.is_symlink() and kind == "export" and path.name == TEMPLATES:
            found += _changed_templates(path, listed)
        elif not path.is_file() or path.is_symlink():
            found.append(path.name)
        elif not re.fullmatch(OWN_NAMES[kind], path.name):
            record = listed.get(path.name) if isinstance(listed, Mapping) else None
            if not (re.fullmatch(OTHER_NAMES.get(kind, "$"), path.name) and _as_written(path, record)):
                found.append(path.name)
    return found


def _changed_templates(folder: Path, listed: Any) -> list[str]:
    """Names within a folder of chat templates that are not as they were written."""
    records = listed if isinstance(listed, Mapping) else {}
    names = {f"{folder.name}/{path.name}": path for path in sorted(folder.iterdir())}
    return [
        name
        for name, path in names.items()
        if path.suffix != ".jinja" or path.is_symlink() or not _as_written(path, records.get(name))
    ]


def _as_written(path: Path, record: Any) -> bool:
    return (
        isinstance(record, Mapping)
        and record.get("size") == path.stat().st_size
        and record.get("sha256") == sha256(path)
    )
