"""Export from files alone: a base model's safetensors and an adapter, streamed tensor by tensor, no model built."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.algorithms.delta import Delta, Form
from dsee_scale.checkpoint.adapter import KIND as ADAPTER
from dsee_scale.checkpoint.adapter import KINDS_WITH_ADAPTER, open_adapter
from dsee_scale.checkpoint.adapter import STEM as ADAPTER_STEM
from dsee_scale.checkpoint.base_model import check_base, config_hash, lasting_config
from dsee_scale.checkpoint.export import (
    ADAPTER_FOLDER,
    INDEX_FILE,
    KIND,
    REPORT_FILE,
    DeltaForm,
    ExportReport,
    merged_weight,
)
from dsee_scale.checkpoint.files import NewFolder, StoredFolder, alike, new_folder, open_folder, read_json
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.masks import apply_mask, open_masks
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord
from dsee_scale.checkpoint.tensor_file import TensorReader, TensorSpec, TensorWriter, aligned
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.partition import Partition, open_partition
from dsee_scale.passes.progress import show_progress

WEIGHTS_FILE = "model.safetensors"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class Sources:
    """What an export reads: the adapter, its masks, and the base's files.

    Attributes:
        record: what the adapter's settings say.
        adapter: A, B, S2 and parameters trained in full.
        masks: packed masks.
        base: the base's tensors.
        keys: names in the model -> names in the base's files, for weights that the adapter changes.
        dtype: dtype of the model that was tuned, in which everything is written.
    """

    record: AdapterRecord
    adapter: TensorReader
    masks: TensorReader
    base: TensorReader
    keys: dict[str, str]
    dtype: torch.dtype


def export_files(
    adapter: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    delta: DeltaForm = "masked",
    overwrite: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Write the tuned and pruned model from its base's folder and an adapter, in one process.

    The output has the base's weight files with the same tensors, changed where the adapter says so, and the
    base's tokenizer. Extra memory: one weight.

    Args:
        adapter: what `save_adapter` or `save_training_state` wrote.
        base: folder of the base model with safetensors files.
        output: output folder.
        delta: as in `export_model`.
        overwrite: replace an earlier export.
        progress: show a progress bar; None shows it if a person watches.

    Raises:
        ConfigError: the output folder is not empty, or a setting is unknown.
        FormatError: a file is damaged or missing, or adapter and base do not fit.
    """
    started = time.perf_counter()
    if delta not in get_args(DeltaForm):
        raise ConfigError(f"delta {delta!r} is unknown; valid: {', '.join(get_args(DeltaForm))}")
    partition = open_partition(nn.Module())
    stored = open_folder(adapter, KINDS_WITH_ADAPTER)
    stored.verify(stored.names(ADAPTER_STEM) + stored.names(MASKS))
    sources = _open_sources(stored, Path(base))
    with new_folder(partition, output, kind=KIND, overwrite=overwrite) as new, alike(partition):
        _copy_settings(Path(base), new.partial, sources)
        if delta == "separate":
            _copy_adapter(partition, stored, new)
        writer = _FileWriter(new, sources, delta)
        files = _planned(sources)
        shown = show_progress(partition, progress)
        with tqdm(total=sum(map(len, files.values())), desc="export", disable=not shown) as bar:
            for name, specs in files.items():
                writer.write_file(name, specs, bar)
        report = writer.report(time.perf_counter() - started)
        _write_index(new, files, report)
    return report


def base_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files, by its index where it has one.

    Raises:
        FormatError: there are none, or one is missing.
    """
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise FormatError(
            f"{folder} holds no {missing[0] if missing else WEIGHTS_FILE}; expected a model folder with safetensors "
            "weights (load the model with transformers and call save_pretrained to convert it)"
        )
    return [folder / name for name in names]


class _FileWriter:
    """Writes weight files tensor by tensor and counts zeros."""

    def __init__(self, new: NewFolder, sources: Sources, delta: DeltaForm) -> None:
        self.new, self.sources, self.delta = new, sources, delta
        self.names = {key: name for name, key in sources.keys.items()}
        self.zeros = dict.fromkeys(sources.record.pruned, 0)
        self.sizes: dict[str, int] = {}
        self.num_parameters = 0
        self.partition = open_partition(nn.Module())

    def write_file(self, filename: str, specs: Sequence[TensorSpec], bar: Any) -> None:
        """One weight file."""
        writer = TensorWriter(self.new, filename, specs, {"format": "pt"})
        for spec in specs:
            writer.write(spec.name, self._tensor(spec))
            self.num_parameters += math.prod(spec.shape)
            bar.update()
        writer.close()
        self.sizes[filename] = writer.file.size

    def report(self, seconds: float) -> ExportReport:
        """Sizes and sparsity."""
        numel = {name: math.prod(how["shape"]) for name, how in self.sources.record.pruned.items()}
        return ExportReport(
            folder=str(self.new.folder),
            delta=self.delta,
            files=self.sizes,
            sparsity={name: self.zeros[name] / numel[name] for name in numel},
            num_pruned=sum(numel.values()),
            num_zero=sum(self.zeros.values()),
            num_parameters=self.num_parameters,
            seconds=seconds,
        )

    def _tensor(self, spec: TensorSpec) -> Tensor:
        record, name = self.sources.record, self.names.get(spec.name, spec.name)
        if name in record.trained:
            return self.sources.adapter.read(name).to(spec.dtype)
        weight = self.sources.base.read(spec.name).to(spec.dtype)
        if name in record.pruned:
            param = nn.Parameter(weight.contiguous(), requires_grad=False)
            apply_mask(self.partition, param, self.sources.masks, name)
            weight = param.data
        if name.removesuffix(".weight") in record.modules and self.delta != "separate":
            update = _update(self.sources, name.removesuffix(".weight"))
            form: Form = "masked" if self.delta == "masked" else "dense"
            weight = merged_weight(weight, update, pruned=name in record.pruned, form=form)
        if name in self.zeros:
            self.zeros[name] = weight.numel() - int(torch.count_nonzero(weight))
        return weight


def _update(sources: Sources, name: str) -> Delta:
    module = sources.record.modules[name]
    a, b, values, rows, cols = (
        sources.adapter.read(f"{name}.dsee_{key}") for key in ("A", "B", "values", "rows", "cols")
    )
    return Delta(
        a=a,
        b=b,
        values=values,
        rows=rows,
        cols=cols,
        slices=module.slices,
        scaling=module.scaling,
        shape=module.shape,
        transposed=module.transposed,
    )


def _open_sources(stored: StoredFolder, base: Path) -> Sources:
    record = AdapterRecord.read(stored)
    if not base.is_dir():
        raise FormatError(
            f"base {base} is no folder; give the folder of {record.base.get('id') or 'the base model'}"
        )
    reader = TensorReader(base_files(base))
    _check_config(record, base, str(stored.path / CONFIG_FILE))
    shapes = {name: tuple(how["shape"]) for name, how in record.pruned.items()}
    for name, module in record.modules.items():
        shapes[f"{name}.weight"] = module.shape[::-1] if module.transposed else module.shape
    keys = {name: _base_key(reader, name, base) for name in shapes}
    for name, shape in shapes.items():
        reader.expect(keys[name], shape)
        if not reader.spec(keys[name]).dtype.is_floating_point:
            raise FormatError(
                f"{reader.where(keys[name])}: {keys[name]} is quantised; give an unquantised base"
            )
    keys |= _trained_keys(reader, record, keys)
    dtype = getattr(torch, str(record.base.get("dtype", "float32")))
    return Sources(record, open_adapter(stored, record), open_masks(stored), reader, keys, dtype)


def _candidates(reader: TensorReader, name: str) -> list[str]:
    """Names in files that may be a parameter of the model: itself, or apart from the model's prefix."""
    if name in reader:
        return [name]
    return [key for key in reader.names() if key.endswith("." + name) or name.endswith("." + key)]


def _base_key(reader: TensorReader, name: str, base: Path) -> str:
    found = _candidates(reader, name)
    if len(found) != 1:
        raise FormatError(
            f"{base}: {name} is {'ambiguous' if found else 'missing'} in the base's weight files, which name or lay "
            "out their tensors otherwise than the model; load the base with transformers, then load_adapter and "
            "export_model"
        )
    return found[0]


def _trained_keys(reader: TensorReader, record: AdapterRecord, keys: dict[str, str]) -> dict[str, str]:
    """Names in files of parameters trained in full, where the base has them: as the other weights are named."""
    name, key = next(iter(keys.items()), ("", ""))
    extra = name.removesuffix(key)  # the model says `transformer.h.0`, the files `h.0`
    lacking = key.removesuffix(name)  # the files say `model.h.0`, the model `h.0`
    named = {trained: lacking + trained.removeprefix(extra) for trained in record.trained}
    return {trained: key for trained, key in named.items() if key in reader}


def _check_config(record: AdapterRecord, base: Path, where: str) -> None:
    if record.base.get("config") is None or not (base / "config.json").is_file():
        return
    from transformers import AutoConfig

    try:
        values = lasting_config(AutoConfig.from_pretrained(str(base)))
    except (OSError, ValueError) as error:
        raise FormatError(f"{base / 'config.json'} cannot be read: {error}") from error
    check_base(record.base, {"id": str(base), "config": values, "config_sha256": config_hash(values)}, where)


def _planned(sources: Sources) -> dict[str, list[TensorSpec]]:
    """Specs by file: the base's, in the tuned model's dtype, and parameters that only the tuned model has."""
    names = {key: name for name, key in sources.keys.items()}
    files: dict[str, list[TensorSpec]] = {path.name: [] for path in sources.base.paths}
    for key in sources.base.names():
        spec = sources.base.spec(key)
        shape = sources.record.trained.get(names.get(key, key), spec.shape)
        files[sources.base.where(key).name].append(
            TensorSpec(key, _written_dtype(spec.dtype, sources), shape)
        )
    last = next(reversed(files))
    for name, shape in sources.record.trained.items():
        if name not in sources.keys:
            files[last].append(TensorSpec(name, sources.dtype, shape))
    return {name: aligned(specs) for name, specs in files.items()}


def _written_dtype(dtype: torch.dtype, sources: Sources) -> torch.dtype:
    return sources.dtype if dtype.is_floating_point else dtype


def _copy_settings(base: Path, folder: Path, sources: Sources) -> None:
    for path in sorted(base.iterdir()):
        ours = path.name.startswith("dsee_")
        if path.is_file() and not path.name.endswith(_WEIGHT_ENDINGS) and not ours and path.name[0] != ".":
            shutil.copyfile(path, folder / path.name)
    identity = sources.record.base
    if identity.get("full_config") is not None:
        config = {
            **identity["full_config"],
            "architectures": [identity["class"]],
            "dtype": identity["dtype"],
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _copy_adapter(partition: Partition, stored: StoredFolder, new: NewFolder) -> None:
    with new_folder(partition, new.partial / ADAPTER_FOLDER, kind=ADAPTER, overwrite=False) as inner:
        for name in [CONFIG_FILE, *stored.names(ADAPTER_STEM), *stored.names(MASKS)]:
            shutil.copyfile(stored.path / name, inner.partial / name)
        inner.adopt()


def _write_index(new: NewFolder, files: dict[str, list[TensorSpec]], report: ExportReport) -> None:
    if len(files) > 1:
        total = sum(spec.nbytes for specs in files.values() for spec in specs)
        weight_map = {spec.name: file for file, specs in files.items() for spec in specs}
        metadata = {"total_parameters": report.num_parameters, "total_size": total}
        new.write_json(INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    new.write_json(REPORT_FILE, report.to_dict())
    new.adopt()
