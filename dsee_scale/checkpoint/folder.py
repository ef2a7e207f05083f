"""Folders that are complete or not there: written beside, hashed, renamed; read back only when whole.

A saved folder holds a manifest with the size and SHA-256 of every other file. Several ranks may write files
into one folder, which then must lie on storage that they share.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from dsee_scale.checkpoint.contents import check_output, unlisted
from dsee_scale.checkpoint.files import MANIFEST, fsync_folder, is_inside, read_json, replace_folder, sha256
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import FormatError
from dsee_scale.partition.port import Partition
from dsee_scale.version import __version__

FORMAT_VERSION = 1
_WHOLE = "it is a whole model (load_pretrained); for its adapter, give the folder that it was exported from"
_PART = "load its base and call load_adapter; then export_model (or `dsee-scale export`) writes a whole model"
NEXT_STEP = {"export": _WHOLE, "adapter": _PART, "training_state": _PART, "lora": _PART}
"""What to do with a folder of a kind that was not expected."""


class HashedFile:
    """A new file that counts and hashes what is written, and is on disk once it is closed; or, `later`, settled."""

    def __init__(self, path: Path, *, later: bool = False) -> None:
        self.path, self.size, self.later, self._hash = path, 0, later, hashlib.sha256()
        self._digest: str | None = None
        self._file: BinaryIO = path.open("xb")

    def write(self, data: bytes | memoryview) -> None:
        """Append; an error names the file."""
        try:
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if not self.later:
            self._hash.update(data)
        self.size += memoryview(data).nbytes

    def close(self) -> None:
        """Flush to the disk; errors of delayed writes (a full disk) surface here."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            if not self.later:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def settle(self) -> None:
        """Flush and hash a closed file for which that was left for later. On any thread."""
        if self.later:
            _flush(self.path)
            self._digest = sha256(self.path)

    @property
    def record(self) -> dict[str, Any]:
        """The manifest's line about this file."""
        return {"size": self.size, "sha256": self._digest or self._hash.hexdigest()}


class NewFolder:
    """A folder in the making; its files appear under their names when all is done.

    Attributes:
        folder: where it goes, links followed.
        partial: where files are written meanwhile; the same path on every rank.
        later: whether files are hashed and flushed by `settle`, not while they are written.
    """

    def __init__(self, partition: Partition, folder: str | Path, *, kind: str, later: bool = False) -> None:
        self.partition, self.kind, self.later = partition, kind, later
        self.folder = Path(os.path.realpath(folder))
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._files: list[HashedFile] = []
        self._records: dict[str, Mapping[str, Any]] = {}

    def create(self, name: str) -> HashedFile:
        """A new file. Hand it to `add` when it is written. Local."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return HashedFile(path, later=self.later)

    def add(self, file: HashedFile) -> None:
        """Close a file and take it into the manifest. Local."""
        file.close()
        self._files.append(file)

    def link(self, name: str, source: Path, record: Mapping[str, Any]) -> None:
        """Take in a file of another saved folder: a second name for it, or a copy where that can't be. Local.

        Raises:
            OSError: it is not there, or not in the size that its manifest told.
        """
        if source.stat().st_size != record["size"]:
            raise OSError(errno.EIO, "is not as it was saved", str(source))
        try:
            os.link(source, self.partial / name)
        except OSError:
            shutil.copyfile(source, self.partial / name)
            _flush(self.partial / name)
        self._records[name] = record

    def unlink(self, name: str) -> None:
        """Undo `link`, as far as it went. Local."""
        self._records.pop(name, None)
        (self.partial / name).unlink(missing_ok=True)

    def settle(self) -> None:
        """Hash and flush what was left for later. Local, on any thread; no file may be added meanwhile."""
        for file in self._files:
            file.settle()
            self._records[file.path.relative_to(self.partial).as_posix()] = file.record
        self._files = []

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file. Local."""
        file = self.create(name)
        file.write((json.dumps(value, indent=2) + "\n").encode())
        self.add(file)

    def adopt(self) -> None:
        """Take files that other code wrote into the partial folder into the manifest. Local."""
        self.settle()
        for path in sorted(self.partial.rglob("*")):
            name = path.relative_to(self.partial).as_posix()
            if path.is_file() and name not in self._records:
                _flush(path)
                self._records[name] = {"size": path.stat().st_size, "sha256": sha256(path)}

    def begin(self, overwrite: bool) -> None:
        """Collective. Refuse a folder that must not be replaced; start an empty partial one."""
        with raise_on_all_ranks(self.partition):
            if self.partition.rank == 0:
                check_output(self.folder, self.kind, overwrite)
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)

    def commit(self) -> None:
        """Collective. Complete the manifest and put the folder in its place."""
        with raise_on_all_ranks(self.partition):
            self.settle()
            if self.partition.rank:
                path = self.partial / f".records-{self.partition.rank}.json"
                path.write_text(json.dumps(self._records), encoding="utf-8")
        with raise_on_all_ranks(self.partition):
            if self.partition.rank == 0:
                self._finish()

    def discard(self) -> None:
        """Remove the partial folder. Local; rank 0 does it."""
        if self.partition.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _finish(self) -> None:
        files = dict(self._records)
        for rank in range(1, self.partition.world_size):
            path = self.partial / f".records-{rank}.json"
            if not path.exists():
                raise FormatError(
                    f"{self.folder}: what rank {rank} wrote is not visible to rank 0; "
                    "save to a folder on storage that all nodes share"
                )
            files.update(json.loads(path.read_text()))
            path.unlink()
        manifest = {"format": self.kind, "version": FORMAT_VERSION, "dsee_scale": __version__, "files": files}
        _write(self.partial / MANIFEST, manifest)
        for inner in (self.partial, *(path for path in self.partial.rglob("*") if path.is_dir())):
            fsync_folder(inner)
        replace_folder(self.partial, self.folder)


@contextlib.contextmanager
def new_folder(
    partition: Partition, folder: str | Path, *, kind: str, overwrite: bool
) -> Iterator[NewFolder]:
    """Collective. A folder that replaces `folder` at the end of the block, or never was.

    An error inside must be one that every rank raises alike; the previous content then stays whole.
    """
    new = NewFolder(partition, folder, kind=kind)
    new.begin(overwrite)
    try:
        yield new
        new.commit()
    except BaseException:
        new.discard()
        raise


@dataclass(frozen=True)
class StoredFolder:
    """A saved folder whose manifest is sound and whose files have the right sizes."""

    path: Path
    kind: str
    files: dict[str, dict[str, Any]]

    def names(self, stem: str) -> list[str]:
        """The safetensors files of one stem: `stem.safetensors` or `stem-00001-of-00002.safetensors`."""
        return sorted(
            n for n in self.files if n == f"{stem}.safetensors" or (n.startswith(f"{stem}-") and "/" not in n)
        )

    def verify(self, names: Sequence[str], *, rank: int = 0, world_size: int = 1) -> None:
        """Compare hashes; with a rank and a world size, only this rank's share of the files."""
        for name in list(names)[rank::world_size]:
            if sha256(self.path / name) != self.files[name]["sha256"]:
                raise FormatError(
                    f"{self.path / name} is damaged: its SHA-256 is not the one in {MANIFEST}; "
                    "copy it again or use another checkpoint"
                )

    def verify_all(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Compare all hashes (or this rank's share), and refuse files that would be used but have none. Local."""
        self.verify(sorted(self.files), rank=rank, world_size=world_size)
        added = unlisted(self.path, self.files)
        if added:
            raise FormatError(
                f"{self.path / added[0]} is not in {MANIFEST}, and would be read with the model; remove it, or save "
                "the folder anew"
            )

    def json(self, name: str) -> dict[str, Any]:
        """Read one of the folder's JSON files, checked against its hash."""
        if name not in self.files:
            raise FormatError(f"{self.path} holds no {name}; {MANIFEST} lists {', '.join(self.files)}")
        self.verify([name])
        return read_json(self.path / name)


def open_if_saved(folder: Path, kinds: Sequence[str]) -> StoredFolder | None:
    """`open_folder` for a folder that dsee_scale saved; None for any other one. Local.

    Raises:
        FormatError: see `open_folder`; files of ours lie there without a manifest; an injected model's lie there.
    """
    if folder.is_dir() and any(folder.glob("dsee_*.json")):
        return open_folder(folder, kinds)
    for path in sorted(folder.glob("model*.safetensors")):
        # A damaged file is explained when it is read.
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if any(".dsee_" in name for name in list(file.keys())):
                raise FormatError(
                    f"{path} holds an injected model that save_pretrained wrote, which would load without its update; "
                    "save it by dsee_scale.export_model (the whole model) or dsee_scale.save_adapter"
                )
    return None


def instead_of(run: Path, kinds: Sequence[str]) -> str:
    """For an error: which folders in a run's output folder are of these kinds; empty if none is. Local."""
    within = [run / name for name in ("model", "adapter") if (run / name / MANIFEST).is_file()]
    fitting = [str(path) for path in within if read_json(path / MANIFEST).get("format") in kinds]
    return f"{run} holds saved folders (a run's output does): give {' or '.join(fitting)}" if fitting else ""


def open_folder(folder: str | Path, kinds: Sequence[str]) -> StoredFolder:
    """Check the manifest of a saved folder, and that each file is there in its full size. Local.

    Raises:
        FormatError: the folder is missing, of another kind, of an unknown version, or incomplete.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder; expected one that holds {MANIFEST}{_interrupted(path)}")
    if not (path / MANIFEST).is_file():
        absent = f"{path} holds no {MANIFEST}; expected a folder that dsee_scale saved, with all its files"
        raise FormatError(instead_of(path, kinds) or absent)
    manifest = read_json(path / MANIFEST)
    kind, version, files = (manifest.get(key) for key in ("format", "version", "files"))
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path / MANIFEST} has format version {version!r}, this dsee_scale ({__version__}) reads "
            f"{FORMAT_VERSION}; use the dsee_scale that wrote it ({manifest.get('dsee_scale')})"
        )
    if kind not in kinds or not isinstance(files, dict):
        step = NEXT_STEP.get(str(kind), "use another folder")
        raise FormatError(f"{path} holds a {kind!r}, expected: {' or '.join(kinds)}; {step}")
    for name, record in files.items():
        if not is_inside(name) or not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            raise FormatError(f"{path / MANIFEST} is damaged: it lists {name[:100]!r} as {str(record)[:100]}")
        _check_size(path / name, record)
    return StoredFolder(path, str(kind), files)


def _check_size(path: Path, record: Any) -> None:
    expected = record.get("size") if isinstance(record, dict) else None
    if not path.is_file():
        raise FormatError(f"{path} is missing although {MANIFEST} lists it; the copy is incomplete")
    if path.stat().st_size != expected:
        raise FormatError(
            f"{path} is {path.stat().st_size} bytes long, {MANIFEST} says {expected}; "
            "it is truncated or was changed: copy it again or use another checkpoint"
        )


def _interrupted(folder: Path) -> str:
    previous = folder.with_name(f".{folder.name}.previous")
    if (previous / MANIFEST).is_file():
        return f". A save was cut off while replacing it: its last whole content is {previous}, rename that"
    return ""


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
