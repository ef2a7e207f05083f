"""Export from files alone: a base model's safetensors and an adapter, streamed tensor by tensor, no model built."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.delta import Delta, Form
from dsee_scale.checkpoint.adapter import KIND as ADAPTER
from dsee_scale.checkpoint.adapter import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.adapter import STEM as ADAPTER_STEM
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder, alike, new_folder, open_folder
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.masks import apply_mask
from dsee_scale.checkpoint.record import CONFIG_FILE
from dsee_scale.checkpoint.tensors import TensorSpec
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import (
    ADAPTER_FOLDER,
    KIND,
    REPORT_FILE,
    DeltaForm,
    ExportReport,
    merged_weight,
)
from dsee_scale.export.plan import (
    NOTHING_SPARSE,
    Format,
    StoredForm,
    count_patterns,
    how_to_load,
    masked_weights,
    part_names,
    weight_writer,
    write_index,
)
from dsee_scale.export.quantised import distance_to
from dsee_scale.export.sources import Sources, open_sources, planned_files, recorded_update
from dsee_scale.export.sparse import STEM as SPARSE
from dsee_scale.export.structure import (
    STRUCTURE_FILE,
    find_structure,
    recorded_model,
    smaller_config,
)
from dsee_scale.partition import Partition, open_partition
from dsee_scale.partition.quantized import as_stored, format_name
from dsee_scale.passes.progress import show_progress

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class Target:
    """The form in which the tensors are written.

    Attributes:
        delta: as in `export_model`.
        form: what is cut out or compressed, by names in the files.
        config: config values where they differ from the tuned model's; None where they do not.
        reason: why no config says the smaller shapes; None if one does.
    """

    delta: DeltaForm
    form: StoredForm
    config: dict[str, Any] | None = None
    reason: str | None = None


def export_files(
    adapter: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    delta: DeltaForm = "masked",
    format: Format = "dense",
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
        format: as in `export_model`.
        overwrite: replace an earlier export.
        progress: show a progress bar; None shows it if a person watches.

    Raises:
        ConfigError: the output folder is not empty, or a setting is unknown.
        FormatError: a file is damaged or missing, or adapter and base do not fit.
    """
    started = time.perf_counter()
    for name, value, valid in (("delta", delta, DeltaForm), ("format", format, Format)):
        if value not in get_args(valid):
            raise ConfigError(f"{name} {value!r} is unknown; valid: {', '.join(get_args(valid))}")
    partition = open_partition(nn.Module())
    stored = open_folder(adapter, KINDS_WITH_ADAPTER)
    stored.verify(stored.names(ADAPTER_STEM) + stored.names(MASKS))
    sources = open_sources(stored, Path(base))
    target = _target(sources, delta, format)
    with new_folder(partition, output, kind=KIND, overwrite=overwrite) as new, alike(partition):
        _copy_settings(Path(base), new, sources, target)
        if delta == "separate":
            _copy_adapter(partition, stored, new)
        writer = _FileWriter(new, sources, target)
        files = planned_files(sources)
        if format == "sparse":
            files = dict(zip(part_names(SPARSE, len(files)), files.values(), strict=True))
        shown = show_progress(partition, progress)
        with tqdm(total=sum(map(len, files.values())), desc="export", disable=not shown) as bar:
            for name, specs in files.items():
                writer.write_file(name, specs, bar)
        report = writer.report(time.perf_counter() - started)
        write_index(new, writer.written, report.num_parameters)
        new.write_json(REPORT_FILE, report.to_dict())
        new.adopt()
    return report


class _FileWriter:
    """Writes weight files tensor by tensor and counts zeros."""

    def __init__(self, new: NewFolder, sources: Sources, target: Target) -> None:
        self.new, self.sources, self.target, self.form = new, sources, target, target.form
        self.names = {key: name for name, key in sources.keys.items()}
        self.masked = masked_weights(sources.record.pruned)
        self.zeros = dict.fromkeys(sources.record.pruned, 0)
        self.numel = dict.fromkeys(sources.record.pruned, 0)
        self.sizes: dict[str, int] = {}
        self.written: dict[str, list[TensorSpec]] = {}
        self.num_parameters = 0
        self.partition = open_partition(nn.Module())
        self.quantization = sources.record.base.get("quantization") if target.delta != "separate" else None
        self.distance: float | None = None

    def write_file(self, filename: str, specs: Sequence[TensorSpec], bar: Any) -> None:
        """One weight file."""
        self.written[filename] = [part for spec in specs for part in self.form.specs(spec)]
        writer = weight_writer(self.new, filename, self.written[filename])
        for spec in specs:
            for name, tensor in self.form.tensors(spec.name, *self._tensor(spec)).items():
                writer.write(name, tensor)
            self.num_parameters += math.prod(self.form.dense_shape(spec))
            bar.update()
        writer.close()
        self.sizes[filename] = writer.size

    def report(self, seconds: float) -> ExportReport:
        """Sizes and sparsity."""
        return ExportReport(
            folder=str(self.new.folder),
            delta=self.target.delta,
            files=self.sizes,
            sparsity={name: self.zeros[name] / self.numel[name] for name in self.numel},
            num_pruned=sum(self.numel.values()),
            num_zero=sum(self.zeros.values()),
            num_parameters=self.num_parameters,
            seconds=seconds,
            format="sparse" if self.form.num_kept else "dense",
            patterns=count_patterns(self.sources.record.pruned),
            **how_to_load(self.form, self.target.reason),
            base=f"unquantised, while {format_name(self.quantization)} was trained on"
            if self.quantization
            else None,
            distance=self.distance,
        )

    def _tensor(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """What a parameter is to be, and the weight whose bits tell what is kept of it."""
        record, name = self.sources.record, self.names.get(spec.name, spec.name)
        if name in record.trained:
            value = self.sources.adapter.read(name).to(spec.dtype)
            return value, value
        weight = self.sources.base.read(spec.name).to(spec.dtype)
        if name in record.pruned:
            param = nn.Parameter(weight.contiguous(), requires_grad=False)
            apply_mask(self.partition, param, self.sources.masks, name)
            weight = param.data
        value = weight
        if name.removesuffix(".weight") in record.modules and self.target.delta != "separate":
            update = recorded_update(self.sources, name.removesuffix(".weight"))
            form: Form = "masked" if self.target.delta == "masked" else "dense"
            value = merged_weight(weight, update, pruned=name in self.masked, form=form)
            self._note_distance(weight, update, value, pruned=name in self.masked)
        if name in self.zeros:
            self.numel[name] = math.prod(self.form.dense_shape(spec))
            self.zeros[name] = self.numel[name] - count_nonzero(value)
        return value, weight

    def _note_distance(self, weight: Tensor, update: Delta, value: Tensor, *, pruned: bool) -> None:
        """How far a merged weight is from what was trained on a quantised base; needs bitsandbytes."""
        if self.quantization is None or find_spec("bitsandbytes") is None:
            return
        stored = as_stored(weight, self.quantization).float()
        trained = merged_weight(stored.masked_fill(weight == 0, 0), update, pruned=pruned, form="dense")
        self.distance = max(self.distance or 0.0, distance_to(trained, value))


def _target(sources: Sources, delta: DeltaForm, format: Format) -> Target:
    """What is cut out and what is compressed, from the record alone."""
    record, keys, masked = sources.record, sources.keys, masked_weights(sources.record.pruned)
    num_kept = {
        keys[name]: int(how["kept"])
        for name, how in record.pruned.items()
        if name in masked
        and len(how["shape"]) == 2
        and not (delta == "dense" and name.removesuffix(".weight") in record.modules)
    }
    if format == "sparse" and not num_kept:
        raise ConfigError(NOTHING_SPARSE)
    form = StoredForm(None, num_kept if format == "sparse" else {})
    if delta == "separate" or not any(
        kind in how for how in record.pruned.values() for kind in UNIT_PATTERNS
    ):
        return Target(delta, form)
    model = recorded_model(record.base, record.pruned, sources.where)
    structure = find_structure(model, lambda param: param.shape)
    assert structure is not None
    config, reason = smaller_config(model, structure, lambda param: param.shape)
    by_key = {keys[name]: lines for name, lines in structure.kept.items()}
    form = dataclasses.replace(form, structure=dataclasses.replace(structure, kept=by_key))
    return Target(delta, form, config and json.loads(config.to_json_string()), reason)


def _copy_settings(base: Path, new: NewFolder, sources: Sources, target: Target) -> None:
    for path in sorted(base.iterdir()):
        ours = path.name.startswith("dsee_")
        if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS) and not ours and path.name[0] != ".":
            shutil.copyfile(path, new.partial / path.name)
    identity = sources.record.base
    if identity.get("full_config") is not None:
        own = {"architectures": [identity["class"]], "dtype": identity["dtype"]}
        config = {**(target.config or identity["full_config"]), **own}
        (new.partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if target.form.structure and target.config is None:
        new.write_json(STRUCTURE_FILE, target.form.structure.to_dict())


def _copy_adapter(partition: Partition, stored: StoredFolder, new: NewFolder) -> None:
    with new_folder(partition, new.partial / ADAPTER_FOLDER, kind=ADAPTER, overwrite=False) as inner:
        for name in [CONFIG_FILE, *stored.names(ADAPTER_STEM), *stored.names(MASKS)]:
            shutil.copyfile(stored.path / name, inner.partial / name)
        inner.adopt()
