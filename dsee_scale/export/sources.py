"""The files that an export without a model reads: a base's safetensors, an adapter and its masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsee_scale.algorithms.delta import Delta
from dsee_scale.checkpoint.adapter import open_adapter
from dsee_scale.checkpoint.folder import StoredFolder, read_json
from dsee_scale.checkpoint.masks import open_masks
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord, check_base, config_hash, lasting_config
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec, aligned
from dsee_scale.errors import FormatError
from dsee_scale.export.plan import INDEX_FILE

WEIGHTS_FILE = "model.safetensors"


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
        where: the adapter's settings file, for errors.
    """

    record: AdapterRecord
    adapter: TensorReader
    masks: TensorReader
    base: TensorReader
    keys: dict[str, str]
    dtype: torch.dtype
    where: str


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


def recorded_update(sources: Sources, name: str) -> Delta:
    """D of one module, from the adapter's tensors."""
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


def open_sources(stored: StoredFolder, base: Path) -> Sources:
    """Open an adapter's files and its base's, and check that they fit.

    Raises:
        FormatError: naming the file and what does not fit.
    """
    record = AdapterRecord.read(stored)
    if not base.is_dir():
        raise FormatError(
            f"base {base} is no folder; give the folder of {record.base.get('id') or 'the base model'}"
        )
    reader = TensorReader(base_files(base))
    where = str(stored.path / CONFIG_FILE)
    _check_config(record, base, where)
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
    return Sources(record, open_adapter(stored, record), open_masks(stored), reader, keys, dtype, where)


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


def planned_files(sources: Sources) -> dict[str, list[TensorSpec]]:
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
