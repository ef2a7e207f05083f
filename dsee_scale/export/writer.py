"""The one exporter: streams weights and updates from a live model or from files into a Hugging Face folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dsee_scale.adapters.state import MASK_UPDATE
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.delta import Delta, Form, merged_weight
from dsee_scale.algorithms.score import all_finite
from dsee_scale.checkpoint.adapter_file import KIND as ADAPTER_KIND
from dsee_scale.checkpoint.files import read_json
from dsee_scale.checkpoint.folder import NewFolder, new_folder
from dsee_scale.checkpoint.tensors import TensorWriter
from dsee_scale.config import UNIT_PATTERNS, DSEEConfig
from dsee_scale.distributed import raise_on_all_ranks, show_progress
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.export.card import CARD_FILE, export_card
from dsee_scale.export.plan import Entry, ExportPlan
from dsee_scale.export.report import INDEX_FILE, KIND, REPORT_FILE, ExportReport, count_patterns
from dsee_scale.export.structure import STRUCTURE_FILE, Structure
from dsee_scale.partition import Partition

logger = logging.getLogger(__name__)

DeltaForm = Literal["masked", "dense", "separate", "none"]
WITHOUT_UPDATE = ("separate", "none")
ADAPTER_FOLDER = "adapter"
LOADER = "dsee_scale.load_pretrained"


class Source(Protocol):
    """What an export reads, and what it knows before a weight moves.

    Attributes:
        partition: the ranks; rank 0 writes.
        plan: the tensors by file.
        pruned: how each weight was pruned, by its name in the model.
        structure: heads and neurons that are cut out; None for none.
        reason: why no stock config says the smaller shapes; None if one does.
        base: what a quantised base is merged as; None for other bases.
        base_id: hub id or folder of the base model, where it is known.
        tuned: settings of the adapters, None where there are none.
        as_trained: a weight as training saw it, float32, where the base was quantised; None where it is not known.
    """

    partition: Partition
    plan: ExportPlan
    pruned: Mapping[str, Mapping[str, Any]]
    structure: Structure | None
    reason: str | None
    base: str | None
    base_id: str | None
    tuned: DSEEConfig | None
    as_trained: Callable[[Tensor], Tensor] | None

    def read(self, entries: list[Entry], *, updates: bool) -> Iterator[tuple[Tensor, Delta | None] | None]:
        """Collective. On rank 0 each whole weight with zeros where it is pruned, and its D; elsewhere None."""

    def stored(self, entry: Entry, value: Tensor) -> Mapping[str, Tensor]:
        """A tensor under the names, and in the layout, of the file. Local."""

    def write_settings(self, new: NewFolder) -> None:
        """Config, tokenizer and the like. Local, rank 0."""

    def write_adapter(self, new: NewFolder) -> None:
        """Collective. The adapter's own folder."""


def check_delta(delta: str) -> None:
    """Raise ConfigError for an unknown form."""
    if delta not in get_args(DeltaForm):
        raise ConfigError(f"delta {delta!r} is unknown; valid: {', '.join(get_args(DeltaForm))}")


def write_model(
    source: Source,
    folder: str | Path,
    delta: DeltaForm,
    *,
    overwrite: bool,
    progress: bool | None,
    notes: str = "",
    pictures: Mapping[str, bytes] | None = None,
) -> ExportReport:
    """Collective. Write a whole model; the folder appears when it is complete.

    Extra memory: the adapters of one weight file; on rank 0 one weight besides, and a block in float32.

    Raises:
        ConfigError: `dense` was asked of matrices that were trained under their mask.
    """
    reject_untrained_form(source.pruned, delta)
    started, partition = time.perf_counter(), source.partition
    with new_folder(partition, folder, kind=KIND, overwrite=overwrite) as new:
        with raise_on_all_ranks(partition, what="writing config and tokenizer"):
            if partition.rank == 0:
                source.write_settings(new)
                if source.structure and source.reason:
                    new.write_json(STRUCTURE_FILE, source.structure.to_dict())
        if delta == "separate":
            with new_folder(
                partition, new.partial / ADAPTER_FOLDER, kind=ADAPTER_KIND, overwrite=False
            ) as inner:
                source.write_adapter(inner)
        writer = _Writer(source, new, delta)
        writer.write_files(show_progress(progress))
        report = writer.report(started)
        with raise_on_all_ranks(partition):
            if partition.rank == 0:
                if len(source.plan.files) > 1:
                    new.write_json(INDEX_FILE, source.plan.index())
                new.write_json(REPORT_FILE, report.to_dict())
                card = export_card(
                    report,
                    base=source.base_id,
                    tuned=source.tuned,
                    pruned=source.pruned,
                    model_class=_class_of(new.partial / "config.json"),
                    notes=notes,
                )
                (new.partial / CARD_FILE).write_text(card, encoding="utf-8")
                for name, content in (pictures or {}).items():
                    (new.partial / name).write_bytes(content)
                new.adopt()
    if writer.untrained:
        logger.warning(
            "%s and %d more were trained as W * M + D (mask_update=False), and delta 'masked' writes (W + D) * M, "
            "which is another model: export with delta 'dense' or 'separate' for the one that was trained",
            writer.untrained[0],
            len(writer.untrained) - 1,
        )
    return report


def _class_of(config: Path) -> str | None:
    """The model's class, where a config was written. Local."""
    named = read_json(config).get("architectures") if config.is_file() else None
    return str(named[0]) if named else None


class _Writer:
    """Writes weight files with updates put in, and counts zeros."""

    def __init__(self, source: Source, new: NewFolder, delta: DeltaForm) -> None:
        self.source, self.new, self.delta = source, new, delta
        self.masked = masked_weights(source.pruned)
        self.zeros = dict.fromkeys(sorted(source.pruned), 0)
        self.sizes = dict.fromkeys(source.plan.files, 0)
        self.distance = 0.0
        self.untrained: list[str] = []

    def write_files(self, show: bool) -> None:
        """Collective. Every weight file of the plan, with a progress bar where one is shown."""
        total = sum(map(len, self.source.plan.files.values()))
        with tqdm(total=total, desc="export", disable=not show) as bar:
            for name, entries in self.source.plan.files.items():
                self.write_file(name, entries, bar)

    def write_file(self, name: str, entries: list[Entry], bar: Any) -> None:
        """Collective. One weight file; an error on rank 0 is raised on every rank when the file ends."""
        partition, writer = self.source.partition, None
        with raise_on_all_ranks(partition):
            if partition.rank == 0:
                specs = [spec for entry in entries for spec in entry.outputs]
                writer = TensorWriter(self.new, name, specs, {"format": "pt"})
        error: Exception | None = None
        stream = self.source.read(entries, updates=self.delta not in WITHOUT_UPDATE)
        for entry in entries:
            error = self._write_next(writer, entry, stream, error)
            bar.update()
        with raise_on_all_ranks(partition):
            if error is not None:
                raise error
            if writer is not None:
                writer.close()
                self.sizes[name] = writer.size

    def _write_next(
        self,
        writer: TensorWriter | None,
        entry: Entry,
        stream: Iterator[tuple[Tensor, Delta | None] | None],
        error: Exception | None,
    ) -> Exception | None:
        """Collective. Take the next weight and write it, unless there was an error; the first error so far.

        The weight is this function's alone, so that it is gone when the next one arrives.
        """
        piece = next(stream)
        if writer is None or piece is None or error is not None:
            return error
        try:
            self._write_entry(writer, entry, *piece)
        except Exception as caught:  # the other ranks still send: take it all, then fail together
            return caught
        return None

    def report(self, started: float) -> ExportReport:
        """Collective. Rank 0's counts on every rank."""
        source, partition = self.source, self.source.partition
        counts = torch.tensor([*self.zeros.values(), *self.sizes.values()], dtype=torch.int64)
        known = partition.broadcast(counts.to(partition.device), src=0).tolist()
        far = torch.tensor([self.distance], dtype=torch.float32, device=partition.device)
        distance = float(partition.broadcast(far, src=0))
        zeros = dict(zip(self.zeros, known, strict=False))
        numel = {entry.name: entry.numel for entries in source.plan.files.values() for entry in entries}
        return ExportReport(
            folder=str(self.new.folder),
            delta=self.delta,
            files=dict(zip(self.sizes, known[len(zeros) :], strict=True)),
            sparsity={name: count / numel[name] for name, count in zeros.items()},
            num_pruned=sum(numel[name] for name in zeros),
            num_zero=sum(zeros.values()),
            num_parameters=sum(numel.values()),
            seconds=time.perf_counter() - started,
            structure=source.structure.summary() if source.structure and source.structure.cuts else None,
            num_removed=source.structure.num_removed if source.structure else 0,
            loads_with=LOADER if source.reason else "transformers",
            reason=source.reason,
            patterns=count_patterns(source.pruned),
            base=source.base,
            distance=distance if source.as_trained else None,
        )

    def _write_entry(self, writer: TensorWriter, entry: Entry, weight: Tensor, update: Delta | None) -> None:
        value = weight
        if update is not None:
            form: Form = "masked" if self.delta == "masked" else "dense"
            pruned = entry.name in self.masked
            if pruned and form == "masked" != trained_form(self.source.pruned, entry.name):
                self.untrained.append(entry.name)
            value = merged_weight(weight, update, pruned=pruned, form=form)
            if self.source.as_trained:
                trained_as = trained_form(self.source.pruned, entry.name)
                trained = merged_weight(
                    self.source.as_trained(weight), update, pruned=pruned, form=trained_as
                )
                self.distance = max(self.distance, relative_distance(trained, value))
        if self.source.structure:
            value = self.source.structure.shrink(entry.name, value)
        if not all_finite(value):
            raise FormatError(
                f"{entry.name} holds NaN or infinity as {value.dtype}, so nothing was written; look at the base's "
                "weights, or export a checkpoint of an earlier step"
            )
        if entry.name in self.zeros:
            self.zeros[entry.name] = value.numel() - count_nonzero(value)
        stored = self.source.stored(entry, value)
        for spec in entry.outputs:
            writer.write(spec.name, stored[spec.name])


def masked_weights(pruned: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of weights whose zeros are a mask on their entries.

    Where only heads or neurons went, the update is zero too, and a weight that is 0 by chance is no mask.
    """
    return {name for name, info in pruned.items() if info.get("pattern") not in UNIT_PATTERNS}


def trained_form(pruned: Mapping[str, Mapping[str, Any]], name: str) -> Form:
    """What a weight and its update were to the model that was trained."""
    return "masked" if pruned.get(name, {}).get(MASK_UPDATE) else "dense"


def reject_untrained_form(pruned: Mapping[str, Mapping[str, Any]], delta: str) -> None:
    """Refuse to write W * M + D of a matrix that was trained as (W + D) * M. Local, alike on all ranks.

    Raises:
        ConfigError: naming it and the way out.
    """
    names = [name for name in pruned if trained_form(pruned, name) == "masked"]
    if delta == "dense" and names:
        raise ConfigError(
            f"delta 'dense' writes W * M + D, and {names[0]} and {len(names) - 1} more were trained as (W + D) * M: it "
            "would be another model. Use delta 'masked', which is the trained model exactly, or prune with "
            "PruneConfig(mask_update=False) to train the update beside the mask"
        )


def relative_distance(trained: Tensor, written: Tensor) -> float:
    """Frobenius norm of the difference of two weights, relative to the first."""
    norm = torch.linalg.vector_norm(trained.float())
    return float(torch.linalg.vector_norm(written.float() - trained.float()) / norm) if norm else 0.0
