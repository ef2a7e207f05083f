"""Export from files alone: a base model's safetensors and an adapter, streamed tensor by tensor, no model built."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import weight_name
from dsee_scale.algorithms.delta import Delta
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER, open_adapter, read_layer
from dsee_scale.checkpoint.adapter_file import STEM as ADAPTER_STEM
from dsee_scale.checkpoint.contents import reject_input
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder, open_folder, open_if_saved
from dsee_scale.checkpoint.identity import REFIT, merged_mark, other_base, other_weights
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.masks import apply_mask, open_masks
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import FormatError
from dsee_scale.export.adapter_source import check_base_folder
from dsee_scale.export.load import is_recorded, recorded_model
from dsee_scale.export.plan import (
    WEIGHTS_FILE,
    Entry,
    ExportPlan,
    base_files,
    loaded_dtypes,
    stored_names,
)
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.export.report import ExportReport
from dsee_scale.export.structure import Structure, as_loaded, find_structure, smaller_config
from dsee_scale.export.writer import WITHOUT_UPDATE, DeltaForm, check_delta, write_model
from dsee_scale.partition import open_partition
from dsee_scale.partition.quantized import as_stored, format_name, holds_numbers
from dsee_scale.passes.fingerprint import as_text, rounded_sum

logger = logging.getLogger(__name__)

OLDER = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
"""What older files of BERT and its like call otherwise."""
WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".ot", ".tflite"),
    *(".gguf", ".onnx", ".onnx_data", ".index.json"),
)


def export_files(
    adapter: str | Path,
    base: str | Path | None,
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
        base: folder of the base model with safetensors files; None takes the folder that the adapter names.
        output: output folder.
        delta: as in `export_model`.
        overwrite: replace an earlier export.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ConfigError: the output folder is not empty, or a setting is unknown.
        FormatError: a file is damaged or missing, or adapter and base do not fit.
    """
    check_delta(delta)
    reject_input(Path(output), (adapter, base))
    stored = open_folder(adapter, KINDS_WITH_ADAPTER)
    stored.verify(stored.names(ADAPTER_STEM) + stored.names(MASKS))
    source = StoredModel(stored, base, cut=delta not in WITHOUT_UPDATE)
    reject_input(Path(output), (source.base_folder,))
    return write_model(source, output, delta, overwrite=overwrite, progress=progress)


class StoredModel:
    """An adapter's files and its base's, checked to fit, as the source of an export.

    Raises:
        FormatError: naming the file and what does not fit.
    """

    def __init__(self, stored: StoredFolder, base: str | Path | None, *, cut: bool) -> None:
        self.partition = open_partition(nn.Module())
        self.record = AdapterRecord.read(stored)
        base = Path(base or self.record.base.get("id") or "")
        self.folder, self.base_folder, self.cut = stored, base, cut
        self.pruned: Mapping[str, Mapping[str, Any]] = self.record.pruned
        self.tuned, self.base_id = self.record.config, self.record.base.get("id")
        self._where = str(stored.path / CONFIG_FILE)
        self._adapted = {weight_name(name, spec): name for name, spec in self.record.modules.items()}
        if not base.name or not base.is_dir():
            name = self.record.base.get("id") or "the base model"
            raise FormatError(f"base {base} is not a folder; give the folder of {name} (--base)")
        self._weights = TensorReader(base_files(base))
        saved = open_if_saved(base, (EXPORT,))
        if saved is not None:
            saved.verify_all()
        check_base_folder(self.record, base, self._where)
        self._said = False
        model = self._recorded_model()
        self._keys = _base_keys(self.record, self._weights, base, model)
        self._adapter, self._masks = open_adapter(stored, self.record), open_masks(stored)
        self._dtype = _dtype(self.record.base.get("dtype", "float32"), self._where)
        self._left_out = _old_copies(self.record, self._weights, self._keys, model)
        self._loaded_as = loaded_dtypes(model or nn.Module(), self._dtype)
        self.structure, self.config, self.reason = _smaller(model, cut)
        self.plan = self._plan()
        quantization = self.record.base.get("quantization") if cut else None
        self.base = f"unquantised, while {format_name(quantization)} was trained on" if quantization else None
        self.as_trained: Callable[[Tensor], Tensor] | None = None
        if quantization and find_spec("bitsandbytes"):
            self.as_trained = lambda w: as_stored(w, quantization).float().masked_fill(w == 0, 0)

    def read(self, entries: list[Entry], *, updates: bool) -> Iterator[tuple[Tensor, Delta | None] | None]:
        """Each tensor in the tuned model's dtype, zeros where it is pruned, and its update."""
        for entry in entries:
            if entry.name in self.record.trained:
                yield self._adapter.read(entry.name).to(entry.outputs[0].dtype), None
                continue
            module = self._adapted.get(entry.name) if updates else None
            yield self._masked(entry), None if module is None else self._update(module)

    def _masked(self, entry: Entry) -> Tensor:
        """A frozen weight in the tuned model's dtype, zeros where it is pruned."""
        weight = self._weights.read(self._keys.get(entry.name, entry.name)).to(entry.outputs[0].dtype)
        if entry.name in self.pruned:
            param = nn.Parameter(weight.contiguous(), requires_grad=False)
            apply_mask(self.partition, param, self._masks, entry.name)
            weight = param.data
        self._check_content(entry.name, weight)
        return weight

    def _check_content(self, name: str, weight: Tensor) -> None:
        """A re-fitted weight must be the very one that the adapter was trained on; another one that differs is said."""
        expected = self.pruned.get(name, {}).get("content")
        if expected is not None and as_text(rounded_sum(weight.reshape(-1), 0)) != expected:
            raise FormatError(other_base(self._where, name))
        if not self._said and self.record.is_other(name, weight):
            logger.warning("%s", other_weights(self._where, self.record.base, name))
            self._said = True

    def stored(self, entry: Entry, value: Tensor) -> Mapping[str, Tensor]:
        """A tensor under the base's name for it."""
        return {entry.outputs[0].name: value}

    def write_adapter(self, new: NewFolder) -> None:
        """A copy of the adapter's files."""
        for name in [CONFIG_FILE, *self.folder.names(ADAPTER_STEM), *self.folder.names(MASKS)]:
            shutil.copyfile(self.folder.path / name, new.partial / name)
        new.adopt()

    def write_settings(self, new: NewFolder) -> None:
        """The base's files that are no weights, and the tuned model's config."""
        for path in sorted(self.base_folder.iterdir()):
            ours = path.name.startswith(("dsee_", "."))
            if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS) and not ours:
                shutil.copyfile(path, new.partial / path.name)
        identity = self.record.base
        if identity.get("full_config") is not None:
            own = {"architectures": [identity["class"]], "dtype": identity["dtype"]}
            config = {**(self.config or identity["full_config"]), **own}
            mark = self.record.refit
            if self.cut:
                mark = merged_mark(mark, self.record.modules, self.record.trained)
            if mark is not None:
                config[REFIT] = mark
            (new.partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            _write_generation_settings(self.base_folder, str(identity["class"]), new.partial)

    def _update(self, name: str) -> Delta:
        """D of one module, from the adapter's tensors."""
        spec = self.record.modules[name]
        return Delta(spec, *read_layer(self._adapter, name, spec))

    def _recorded_model(self) -> nn.Module | None:
        """The tuned model without weights; None where transformers has no such class and nothing is to be cut out."""
        units = self.cut and any(kind in info for info in self.pruned.values() for kind in UNIT_PATTERNS)
        if not units and not is_recorded(self.record.base):
            return None
        return recorded_model(self.record.base, self.record.pruned, self._where)

    def _plan(self) -> ExportPlan:
        """The base's files in the tuned model's dtypes, and parameters that only the tuned model has."""
        names, (name_of, key_of) = {key: name for name, key in self._keys.items()}, _prefixes(self._keys)
        files: dict[str, list[Entry]] = {path.name: [] for path in self._weights.paths}
        for key in (key for key in self._weights.names() if key not in self._left_out):
            spec, name = self._weights.spec(key), names.get(key, key)
            shape = self.record.trained.get(name, spec.shape)
            shape = self.structure.shape(name, shape) if self.structure else shape
            loaded_as = self._loaded_as(_renamed(key, name_of, key_of))
            dtype = loaded_as if spec.dtype.is_floating_point else spec.dtype
            files[self._weights.where(key).name].append(Entry(name, (TensorSpec(key, dtype, shape),)))
        last = next(reversed(files))
        for name, shape in self.record.trained.items():
            if name not in self._keys:
                files[last].append(Entry(name, (TensorSpec(name, self._dtype, shape),)))
        written = {file: entries for file, entries in files.items() if entries}
        # A base may have an index of one file; without an index this name alone is looked for.
        if len(written) == 1:
            return ExportPlan({WEIGHTS_FILE: next(iter(written.values()))})
        return ExportPlan(written)


def _smaller(
    model: nn.Module | None, cut: bool
) -> tuple[Structure | None, dict[str, Any] | None, str | None]:
    """What is cut out, the config that says so, and why there is none, from the record alone."""
    if model is None:
        return None, None, None
    structure = find_structure(model, lambda param: param.shape) if cut else as_loaded(model)
    if structure is None:
        return None, None, None
    config, reason = smaller_config(model, structure, lambda param: param.shape)
    return structure, config and json.loads(config.to_json_string()), reason


def _dtype(name: Any, where: str) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise FormatError(
            f"{where} is damaged: the base's dtype is {str(name)[:50]!r}; use another copy of it"
        )
    return found


def _base_keys(
    record: AdapterRecord, reader: TensorReader, base: Path, model: nn.Module | None
) -> dict[str, str]:
    """Names in the model -> names in the base's files, for weights that the adapter changes; shapes are checked."""
    shapes = {name: tuple(info["shape"]) for name, info in record.pruned.items()}
    for name, module in record.modules.items():
        stacked = (
            (len(module.slices), module.width, module.shape[1]) if module.width else module.storage_shape
        )
        shapes[weight_name(name, module)] = stacked
    keys = {name: _base_key(reader, name, base) for name in shapes}
    for name, shape in shapes.items():
        reader.expect(keys[name], shape)
        if not holds_numbers(reader.spec(keys[name]).dtype):
            where = reader.where(keys[name])
            raise FormatError(f"{where}: {keys[name]} is quantised; give an unquantised base")
    trained = {name: _trained_key(reader, name, keys, model, base) for name in record.trained}
    return keys | {name: key for name, key in trained.items() if key is not None}


def _base_key(reader: TensorReader, name: str, base: Path) -> str:
    """The name in the files: the parameter's own, or apart from the model's prefix."""
    found = [key for key in reader.names() if key.endswith("." + name) or name.endswith("." + key)]
    found = [name] if name in reader else found
    if len(found) != 1:
        raise _otherwise(base, name, "ambiguous" if found else "missing")
    return found[0]


def _otherwise(base: Path, name: str, what: str) -> FormatError:
    return FormatError(
        f"{base}: {name} is {what} in the base's weight files, which name or lay out their tensors otherwise than the "
        "model; load the base with transformers, then load_adapter and export_model"
    )


def _trained_key(
    reader: TensorReader, name: str, keys: Mapping[str, str], model: nn.Module | None, base: Path
) -> str | None:
    """The name in files of a parameter trained in full; None where the base has none."""
    name_of, key_of = _prefixes(keys)
    own = _renamed(name, key_of, name_of)
    if own in reader:
        return own
    stored = stored_names(model, name) if model is not None else None
    older = re.sub(r"LayerNorm\.(weight|bias)$", lambda found: OLDER[found[0]], own)
    found = [
        key for key in [older, *(_renamed(each, key_of, name_of) for each in stored or ())] if key in reader
    ]
    if len(found) > 1 or (stored is None and model is not None):
        raise _otherwise(base, name, "laid out otherwise" if stored is None else "in several pieces")
    return found[0] if found else None


def _prefixes(keys: Mapping[str, str]) -> tuple[str, str]:
    """What the model's names and the files' begin with where they differ, as one of each says.

    The model says `transformer.h.0`, the files `h.0`; or the files say `model.h.0`, the model `h.0`.
    """
    name, key = next(iter(keys.items()), ("", ""))
    return name.removesuffix(key), key.removesuffix(name)


def _renamed(name: str, new: str, old: str) -> str:
    """A name with another beginning."""
    return new + name.removeprefix(old)


def _old_copies(
    record: AdapterRecord, reader: TensorReader, keys: Mapping[str, str], model: nn.Module | None
) -> set[str]:
    """Names in files of weights that the model ties to one that was trained in full, which some bases hold twice.

    transformers ties what the files hold twice only where both are equal: the others are weights of their own.
    """
    name_of, key_of = _prefixes(keys)
    found = set()
    for name, others in _tied_to(record, model).items():
        own = keys.get(name)
        for key in (_renamed(other, key_of, name_of) for other in others):
            if key in reader and (own is None or torch.equal(reader.read(own), reader.read(key))):
                found.add(key)
    return found


def _tied_to(record: AdapterRecord, model: nn.Module | None) -> dict[str, list[str]]:
    """Parameters trained in full: the other names that the model has for each."""
    if model is None:
        return {}
    sharing: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(param), []).append(name)
    groups = [(set(names) & set(record.trained), names) for names in sharing.values()]
    return {next(iter(own)): [n for n in names if n not in own] for own, names in groups if len(own) == 1}


def _write_generation_settings(base: Path, model_class: str, folder: Path) -> None:
    """What transformers reads from an older base's config, where the base has no file for it. Local."""
    import transformers

    known = getattr(transformers, model_class, None)
    if (base / "generation_config.json").is_file() or known is None or not known.can_generate():
        return
    settings = transformers.GenerationConfig.from_pretrained(
        base, config_file_name="config.json", _from_model_config=True
    )
    settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
