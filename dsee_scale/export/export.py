"""Export a tuned and pruned model as a plain Hugging Face folder, one weight at a time."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.linear import adapted_layers, delta_record
from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.delta import Delta, Form, combine, delta_block, flat_blocks
from dsee_scale.checkpoint.adapter import KIND as ADAPTER
from dsee_scale.checkpoint.adapter import write_adapter
from dsee_scale.checkpoint.folder import NewFolder, alike, new_folder
from dsee_scale.checkpoint.tensors import ScatteredWriter, TensorWriter
from dsee_scale.errors import ConfigError
from dsee_scale.export.plan import (
    INDEX_FILE,
    Entry,
    ExportPlan,
    Format,
    StoredForm,
    count_kept,
    count_patterns,
    how_to_load,
    masked_weights,
    plan_export,
    weight_writer,
)
from dsee_scale.export.quantised import decoded_base, distance_to, reject_unknown_quantisation
from dsee_scale.export.structure import STRUCTURE_FILE, find_structure, smaller_config
from dsee_scale.export.tokenizer import save_tokenizer
from dsee_scale.partition import Partition, open_partition, unwrap
from dsee_scale.passes.progress import show_progress

logger = logging.getLogger(__name__)

DeltaForm = Literal["masked", "dense", "separate"]
KIND = "export"
REPORT_FILE = "dsee_export.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote; printing it shows a summary.

    Attributes:
        folder: the exported model.
        delta: how the update was put in.
        files: weight files with their sizes in bytes.
        sparsity: fraction of entries that are zero in the model, of each pruned weight by its name.
        num_pruned: entries of the pruned weights, without heads and neurons that were cut out.
        num_zero: how many of them are zero.
        num_parameters: entries of all tensors of the model.
        seconds: time taken.
        format: `dense` or `sparse` files.
        structure: what was cut out, one line; None for nothing.
        num_removed: entries of all tensors that were cut out with them.
        loads_with: `transformers`, or `dsee_scale.load_pretrained` where stock classes cannot load it.
        reason: why they cannot; None where they can.
        patterns: pruned weights of each pattern.
        base: what the update was merged into, where the model was trained on a quantised base.
        distance: largest relative distance (Frobenius) of a merged weight to what was trained, W * M + D, for
            a quantised base; None where it is not known.
    """

    folder: str
    delta: str
    files: dict[str, int]
    sparsity: dict[str, float]
    num_pruned: int
    num_zero: int
    num_parameters: int
    seconds: float
    format: str = "dense"
    structure: str | None = None
    num_removed: int = 0
    loads_with: str = "transformers"
    reason: str | None = None
    patterns: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    distance: float | None = None

    @property
    def nbytes(self) -> int:
        """Size of the weight files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        lines = [
            f"dsee_scale: exported {self.num_parameters:,} parameters to {self.folder} "
            f"(delta={self.delta!r}, format={self.format!r}): {len(self.files)} files, "
            f"{self.nbytes / 1e6:,.1f} MB, {self.seconds:.1f} s"
        ]
        if self.structure:
            lines.append(f"  {self.structure}")
        if self.reason:
            lines.append(f"  stock transformers cannot load it: {self.reason}; {self.loads_with} does")
        if self.base:
            how_far = "not measured" if self.distance is None else f"up to {self.distance:.2g} (relative)"
            lines.append(f"  base: {self.base}; distance of merged weights to what was trained: {how_far}")
        if self.num_pruned and not (self.structure and self.num_zero < self.num_pruned / 10_000):
            share = 100 * self.num_zero / self.num_pruned
            lines.append(f"  {share:.2f}% of the {self.num_pruned:,} entries of pruned weights are zero")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {
            key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("folder", "seconds")
        }
        return values


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    delta: DeltaForm = "masked",
    format: Format = "dense",
    tokenizer: Any = None,
    max_shard_size: int | str = "2GB",
    overwrite: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Collective. Write the whole model, streaming one weight at a time to rank 0, which writes the files.

    Extra memory: the adapters of one weight file; on rank 0 one weight besides, and a block in float32.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it. It is not changed.
        folder: output folder; parents are made.
        delta: `masked` writes (W + D) * M, as sparse as W; `dense` writes W * M + D; both are plain models
            that stock transformers loads. `separate` writes W * M, with the adapter in `folder/adapter`.
            Removed heads and neurons are cut out of the files, but for `separate`, where they stay as zeros.
        format: `sparse` stores pruned weights as a bit for each entry and the kept values, for
            `dsee_scale.load_pretrained`.
        tokenizer: saved along (or a processor); anything with `save_pretrained`.
        max_shard_size: size of a weight file at most, unless one weight is larger.
        overwrite: replace an earlier export. A folder with other files in it is never replaced.
        progress: show a progress bar on rank 0; None shows it if a person watches.

    Returns:
        Sizes and sparsity, the same on every rank.

    Raises:
        ConfigError: the folder is not empty, a setting is unknown, or nothing is sparse.
        TargetError: the base is quantised by something else than bitsandbytes.
        FormatError: writing failed, e.g. no space is left; what was there before stays.
    """
    started = time.perf_counter()
    module, partition = unwrap(model), open_partition(model)
    with alike(partition):
        _check_settings(delta, format)
        reject_unknown_quantisation(module, partition)
        structure = find_structure(module, partition.shape) if delta != "separate" else None
        config, reason = smaller_config(module, structure, partition.shape) if structure else (None, None)
    num_kept = count_kept(partition, module, delta) if format == "sparse" else {}
    with alike(partition):
        form = StoredForm(structure, num_kept)
        plan = plan_export(partition, module, max_shard_size, form)
    with new_folder(partition, folder, kind=KIND, overwrite=overwrite) as new:
        with alike(partition):
            if partition.rank == 0:
                _write_settings(module, new.partial, tokenizer, config or getattr(module, "config", None))
                if structure and config is None:
                    new.write_json(STRUCTURE_FILE, structure.to_dict())
        if delta == "separate":
            with new_folder(partition, new.partial / ADAPTER_FOLDER, kind=ADAPTER, overwrite=False) as inner:
                write_adapter(partition, module, inner)
        writer = _ExportWriter(partition, module, new, plan, delta, form)
        writer.write_files(show_progress(partition, progress))
        report = writer.report(started, format, reason)
        with alike(partition):
            if partition.rank == 0:
                _write_index(new, plan, report)
    if partition.rank == 0:
        logger.info("%s", report)
    return report


def _check_settings(delta: str, format: str) -> None:
    for name, value, valid in (("delta", delta, DeltaForm), ("format", format, Format)):
        if value not in get_args(valid):
            raise ConfigError(f"{name} {value!r} is unknown; valid: {', '.join(get_args(valid))}")


class _ExportWriter:
    """Streams entries to rank 0 and writes them with their update put in."""

    def __init__(
        self,
        partition: Partition,
        module: nn.Module,
        new: NewFolder,
        plan: ExportPlan,
        delta: DeltaForm,
        form: StoredForm,
    ) -> None:
        self.partition, self.module, self.new, self.plan = partition, module, new, plan
        self.delta, self.form = delta, form
        self.layers = {f"{n}.weight": layer for n, layer in adapted_layers(module).items()}
        self.masked = masked_weights(model_state(module).pruned)
        self.zeros = dict.fromkeys(sorted(model_state(module).pruned), 0)
        self.sizes = dict.fromkeys(plan.files, 0)
        self.distance = 0.0

    def write_files(self, show: bool) -> None:
        """Collective. Every weight file of the plan, with a progress bar where one is shown."""
        with tqdm(total=self.plan.num_entries, desc="export", disable=not show) as bar:
            for name, entries in self.plan.files.items():
                self.write_file(name, entries, bar)

    def write_file(self, name: str, entries: list[Entry], bar: Any) -> None:
        """Collective. One weight file; an error on rank 0 is raised on every rank when the file ends."""
        writer: TensorWriter | ScatteredWriter | None = None
        with alike(self.partition):
            if self.partition.rank == 0:
                writer = weight_writer(self.new, name, [spec for entry in entries for spec in entry.outputs])
        updates = self._gather_updates(entries)
        stream = self.partition.gather_each([e.tensor for e in entries if isinstance(e.tensor, nn.Parameter)])
        error: Exception | None = None
        for entry in entries:
            whole = next(stream) if isinstance(entry.tensor, nn.Parameter) else entry.tensor
            bar.update()
            if writer is None or whole is None or error is not None:
                continue
            try:
                self._write_entry(writer, entry, whole, updates.get(entry.name))
            except Exception as caught:  # the other ranks still send: take it all, then fail together
                error = caught
        with alike(self.partition):
            if error is not None:
                raise error
            if writer is not None:
                writer.close()
                self.sizes[name] = writer.size

    def report(self, started: float, format: Format, reason: str | None) -> ExportReport:
        """Collective. Rank 0's counts on every rank; `reason` is why stock classes cannot load the folder."""
        counts = torch.tensor([*self.zeros.values(), *self.sizes.values()], dtype=torch.int64)
        known = self.partition.broadcast(counts.to(self.partition.device), src=0).tolist()
        far = torch.tensor([self.distance], dtype=torch.float32, device=self.partition.device)
        distance = float(self.partition.broadcast(far, src=0)) if self.partition.codecs else None
        zeros = dict(zip(self.zeros, known, strict=False))
        entries = {e.name: e for es in self.plan.files.values() for e in es}
        numel = {name: entries[name].numel for name in zeros}
        return ExportReport(
            folder=str(self.new.folder),
            delta=self.delta,
            files=dict(zip(self.sizes, known[len(zeros) :], strict=True)),
            sparsity={name: zeros[name] / numel[name] for name in zeros},
            num_pruned=sum(numel.values()),
            num_zero=sum(zeros.values()),
            num_parameters=sum(entry.numel for entry in entries.values()),
            seconds=time.perf_counter() - started,
            base=decoded_base(self.partition),
            distance=distance,
            format=format,
            patterns=count_patterns(model_state(self.module).pruned),
            **how_to_load(self.form, reason),
        )

    def _gather_updates(self, entries: list[Entry]) -> dict[str, Tensor]:
        """Collective. The adapters of the file's adapted weights, whole on every rank, in one transfer."""
        names = [e.name for e in entries if e.name in self.layers] if self.delta != "separate" else []
        layers: list[Any] = [self.layers[name] for name in names]
        flats = self.partition.gather([layer.dsee_flat for layer in layers])
        return dict(zip(names, flats, strict=True))

    def _write_entry(
        self,
        writer: TensorWriter | ScatteredWriter,
        entry: Entry,
        weight: Tensor,
        update: Tensor | None,
    ) -> None:
        value = weight
        if update is not None:
            delta = delta_record(self.layers[entry.name], update)
            form: Form = "masked" if self.delta == "masked" else "dense"
            value = merged_weight(weight, delta, pruned=entry.name in self.masked, form=form)
            if self.partition.codecs:
                trained = merged_weight(weight.float(), delta, pruned=entry.name in self.masked, form="dense")
                self.distance = max(self.distance, distance_to(trained, value))
        if entry.name in self.zeros:
            structure = self.form.structure
            left = structure.shrink(entry.name, value) if structure else value
            self.zeros[entry.name] = left.numel() - count_nonzero(left)
        stored = entry.stored(self.module, self.form, value, weight)
        for spec in entry.outputs:
            writer.write(spec.name, stored[spec.name])


def merged_weight(weight: Tensor, update: Delta, *, pruned: bool, form: Form) -> Tensor:
    """(W + D) * M or W * M + D in the weight's dtype, computed block by block in float32.

    Args:
        weight: whole, in its storage layout; not changed.
        update: D.
        pruned: whether the weight's zeros are its mask; otherwise M keeps all.
        form: `masked` or `dense`.

    Returns:
        A new tensor on the CPU.
    """
    merged = torch.empty(weight.shape, dtype=weight.dtype)
    for block in flat_blocks(update.storage_shape, 0, weight.numel()):
        rows = slice(block.start_row, block.stop_row)
        w = weight[rows].to(update.a.device)
        mask = w != 0 if pruned else None
        merged[rows] = combine(w, delta_block(update, block.start_row, block.stop_row), mask, form)
    return merged


def _write_settings(module: Any, folder: Path, tokenizer: Any, config: Any) -> None:
    if hasattr(module, "save_pretrained"):
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are written decoded
        config.dtype = str(module.dtype).removeprefix("torch.")
        config.architectures = [type(module).__name__]
        config.save_pretrained(folder)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)
        if module.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(module, str(folder), config=config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _write_index(new: NewFolder, plan: ExportPlan, report: ExportReport) -> None:
    if len(plan.files) > 1 and report.format == "dense":
        new.write_json(INDEX_FILE, plan.index(report.num_parameters))
    new.write_json(REPORT_FILE, report.to_dict())
    new.adopt()
