"""A model folder with dense weight files becomes one with compressed files, and back: the same weights."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from dsee_scale.checkpoint.adapter import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.folder import MANIFEST, StoredFolder, alike, new_folder, open_folder
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec, aligned
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import KIND, REPORT_FILE, ExportReport
from dsee_scale.export.from_files import WEIGHT_ENDINGS
from dsee_scale.export.plan import (
    COMPRESSED,
    INDEX_FILE,
    LOADER,
    NOTHING_SPARSE,
    Format,
    StoredForm,
    part_names,
    weight_writer,
    write_index,
)
from dsee_scale.export.sources import base_files
from dsee_scale.export.sparse import STEM as SPARSE
from dsee_scale.export.sparse import SparseReader, kept_entries, pays
from dsee_scale.export.structure import STRUCTURE_FILE
from dsee_scale.partition import open_partition
from dsee_scale.passes.progress import show_progress


def convert_folder(
    source: str | Path,
    output: str | Path,
    *,
    format: Format,
    overwrite: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Write a model's folder again with weight files of another format, in one process.

    Extra memory: one weight. To sparse files, each weight is read twice: to count, and to write.

    Args:
        source: an exported model, or any model folder with safetensors files.
        output: output folder.
        format: `sparse` or `dense`.
        overwrite: replace an earlier export.
        progress: show a progress bar; None shows it if a person watches.

    Raises:
        ConfigError: the output folder is not empty, or no weight gets smaller.
        FormatError: a file is damaged, incomplete or of an unknown version.
    """
    started = time.perf_counter()
    if format not in get_args(Format):
        raise ConfigError(f"format {format!r} is unknown; valid: {', '.join(get_args(Format))}")
    source, partition = Path(source), open_partition(nn.Module())
    kinds = (KIND, *KINDS_WITH_ADAPTER)
    stored = open_folder(source, kinds) if (source / MANIFEST).is_file() else None
    if stored is not None and stored.kind != KIND:
        raise ConfigError(f"{source} holds an adapter; name the folder of its base model too (--base FOLDER)")
    if stored is not None:
        stored.verify([name for name in stored.files if name.endswith(".safetensors")])
    reader = open_weights(source, stored)
    files: dict[Path, list[TensorSpec]] = {path: [] for path in reader.paths}
    for name in reader.names():
        files[reader.where(name)].append(reader.spec(name))
    shown = show_progress(partition, progress)
    with tqdm(total=len(reader.names()), desc="convert", disable=not shown) as bar:
        form = StoredForm(None, _count(reader) if format == "sparse" else {})
        names = part_names(SPARSE if format == "sparse" else "model", len(files))
        with new_folder(partition, output, kind=KIND, overwrite=overwrite) as new, alike(partition):
            _copy_others(source, new.partial)
            sizes, written = {}, {}
            for name, specs in zip(names, files.values(), strict=True):
                ordered = aligned(specs)
                written[name] = [part for spec in ordered for part in form.specs(spec)]
                writer = weight_writer(new, name, written[name])
                for spec in ordered:
                    weight = reader.read(spec.name)
                    for key, tensor in form.tensors(spec.name, weight, weight).items():
                        writer.write(key, tensor)
                    bar.update()
                writer.close()
                sizes[name] = writer.size
            entries = sum(math.prod(spec.shape) for specs in files.values() for spec in specs)
            report = _report(stored, new.folder, sizes, entries, format, time.perf_counter() - started)
            write_index(new, written, entries)
            new.write_json(REPORT_FILE, report.to_dict())
            new.adopt()
    return report


def open_weights(folder: Path, stored: StoredFolder | None) -> SparseReader:
    """The weights of a model folder, dense or compressed.

    Args:
        folder: where.
        stored: the folder's manifest, where it has one.

    Raises:
        FormatError: there are no weight files, or one is damaged or of an unknown version.
    """
    if stored is not None and stored.names(SPARSE):
        return SparseReader.of(stored)
    return SparseReader(TensorReader(base_files(folder)))


def _count(reader: SparseReader) -> dict[str, int]:
    """Entries to store of each weight that gets smaller."""
    found = {}
    for name in reader.names():
        spec = reader.spec(name)
        if pays(spec, 0):
            kept = int(torch.count_nonzero(kept_entries(reader.read(name))))
            if pays(spec, kept):
                found[name] = kept
    if not found:
        raise ConfigError(NOTHING_SPARSE)
    return found


def _report(
    stored: StoredFolder | None,
    folder: Path,
    sizes: dict[str, int],
    entries: int,
    format: str,
    seconds: float,
) -> ExportReport:
    """The source's report, with what the conversion changes."""
    known: dict[str, Any] = {
        "delta": "masked",
        "sparsity": {},
        "num_pruned": 0,
        "num_zero": 0,
        "num_parameters": entries,
    }
    if stored is not None:
        known |= stored.json(REPORT_FILE)
    reason = COMPRESSED if format == "sparse" else None
    if format == "dense" and stored is not None and STRUCTURE_FILE in stored.files:
        reason = "its config cannot say the sizes of its blocks"
    known |= {"files": sizes, "format": format, "reason": reason}
    known |= {"loads_with": LOADER if reason else "transformers"}
    return ExportReport(folder=str(folder), seconds=seconds, **known)


def _copy_others(source: Path, folder: Path) -> None:
    """Everything but weights in any format, their index, and what is written anew."""
    ours = (MANIFEST, REPORT_FILE, INDEX_FILE)
    weights = shutil.ignore_patterns(*(f"*{ending}" for ending in WEIGHT_ENDINGS))
    for path in sorted(source.iterdir()):
        if path.name not in ours and not path.name.endswith(WEIGHT_ENDINGS) and path.name[0] != ".":
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=weights)
            else:
                shutil.copyfile(path, folder / path.name)
