"""A saved folder to a model hub: all of it in one commit, or none of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsee_scale.checkpoint.adapter_file import KIND as ADAPTER
from dsee_scale.checkpoint.files import MANIFEST, read_json
from dsee_scale.checkpoint.folder import StoredFolder, open_folder
from dsee_scale.checkpoint.lora_folder import CONFIG_NAME as LORA_CONFIG
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord
from dsee_scale.errors import ConfigError, DSEEError, FormatError
from dsee_scale.export.card import CARD_FILE, HUB_ID, adapter_card, is_hub_id, moved_card
from dsee_scale.export.export import BASE_FOLDER
from dsee_scale.export.lora import KIND as LORA
from dsee_scale.export.report import KIND as EXPORT

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KINDS = (EXPORT, LORA, ADAPTER)


def push_to_hub(
    folder: str | Path, repo: str, *, base: str | None = None, private: bool | None = None
) -> str:
    """Upload an export, an adapter or a LoRA folder as one commit; what an earlier push left goes in the same one.

    Every file is compared with its saved hash first. Weights are sent before the commit, which makes them visible all
    at once: a push that fails leaves the repository as it was (a new one: empty).

    Args:
        folder: what `export_model`, `export_lora` or `save_adapter` wrote.
        repo: OWNER/NAME; made where it does not exist. The token is huggingface_hub's own (`hf auth login`).
        base: hub id of an adapter's base, where the folder names a folder of this machine. A base that lies in a LoRA
            folder is left out then: push it to that repository first.
        private: for a new repository; None is the owner's default.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: the repository holds someone else's files, the base is no hub id, or the hub refuses.
        FormatError: a file is damaged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    path = Path(folder)
    stored = open_folder(path, KINDS)
    stored.verify_all()
    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"repository {repo!r} is not OWNER/NAME")
    files = _files(stored, repo, base)
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        info = api.model_info(repo)
        there = {file.rfilename for file in info.siblings or ()}
        _reject_foreign(repo, there)
        earlier = _earlier_files(api, repo, info.sha) if MANIFEST in there else set()
        gone = sorted((earlier & there) - files.keys())
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        message = f"{stored.kind} by dsee_scale"
        return str(api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha))
    except DSEEError:
        raise
    except Exception as error:  # its client's own, the network's, a server's that it did not expect
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} was not pushed, nothing of it is in {repo}: {reason}") from error


def _files(stored: StoredFolder, repo: str, base: str | None) -> dict[str, str | bytes]:
    """Name in the repository -> path or content; names of this machine's folders are replaced."""
    names = [name for name in stored.files if not (base and name.startswith(f"{BASE_FOLDER}/"))]
    files: dict[str, str | bytes] = {name: str(stored.path / name) for name in names}
    changed = _with_base(stored, base)
    title = stored.path.resolve().name
    if (stored.path / CARD_FILE).is_file():
        card = moved_card((stored.path / CARD_FILE).read_text(encoding="utf-8"), title, repo, base)
    else:
        named = AdapterRecord.read(stored).base.get("class") if stored.kind == ADAPTER else None
        card = adapter_card(repo, base=base or _named_base(stored), model_class=named)
    changed[CARD_FILE] = card.encode()
    files |= changed
    manifest = read_json(stored.path / MANIFEST)
    records = {name: manifest["files"].get(name) for name in files}
    for name, content in changed.items():
        records[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files[MANIFEST] = _json({**manifest, "files": records})
    return files


def _with_base(stored: StoredFolder, base: str | None) -> dict[str, bytes]:
    """The file that names the base, where it must name another one."""
    name, named = _naming_file(stored), _named_base(stored)
    if name is None:
        if base is not None:
            raise ConfigError(f"{stored.path} holds a whole model: leave base out")
        return {}
    if base is None and is_hub_id(named):
        return {}
    if base is None or not is_hub_id(base):
        beside = (
            f"push {stored.path / BASE_FOLDER} first, and" if stored.kind == LORA else "give its repository:"
        )
        raise ConfigError(
            f"{stored.path} belongs to {base or named or 'an unnamed base'}, which is not a repository that others can "
            f"load; {beside} name it by base='OWNER/NAME' (--base)"
        )
    values = read_json(stored.path / name)
    if stored.kind == LORA:
        values["base_model_name_or_path"] = base
    else:
        values["base_model"]["id"] = base
    return {name: _json(values)}


def _naming_file(stored: StoredFolder) -> str | None:
    return {LORA: LORA_CONFIG, ADAPTER: CONFIG_FILE}.get(stored.kind)


def _named_base(stored: StoredFolder) -> str | None:
    name = _naming_file(stored)
    if name is None:
        return None
    values = read_json(stored.path / name)
    found = values.get("base_model_name_or_path") if stored.kind == LORA else values["base_model"].get("id")
    return None if found is None else str(found)


def _reject_foreign(repo: str, there: set[str]) -> None:
    foreign = sorted(there - {".gitattributes", CARD_FILE})
    if foreign and MANIFEST not in there:
        raise ConfigError(
            f"{repo} holds files that dsee_scale did not push ({', '.join(foreign[:3])}); choose another repository"
        )


def _earlier_files(api: HfApi, repo: str, commit: str | None) -> set[str]:
    """Names of what an earlier push left there, by its manifest; others in the repository aren't ours to delete."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read_json(Path(api.hf_hub_download(repo, MANIFEST, revision=commit, cache_dir=folder)))
        except FormatError as error:
            raise ConfigError(
                f"{MANIFEST} in {repo} cannot be read, so what an earlier push left there is not known: delete it "
                "there, with the files of the old model, or choose another repository"
            ) from error
    return set(found.get("files", ()))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
