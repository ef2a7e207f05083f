"""What a folder holds: adapter, LoRA, training state, exported or plain model. Reads files one tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.files import MANIFEST, damaged, read_json
from dsee_scale.checkpoint.folder import StoredFolder, instead_of, open_if_saved
from dsee_scale.checkpoint.lora_folder import CONFIG_NAME, is_lora_folder, open_lora
from dsee_scale.checkpoint.record import CONFIG_FILE, AdapterRecord
from dsee_scale.checkpoint.tensors import TensorReader
from dsee_scale.checkpoint.training_state import KIND as TRAINING_STATE
from dsee_scale.checkpoint.training_state import STATE_FILE
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import FormatError
from dsee_scale.export.load import recorded_model
from dsee_scale.export.lora import KIND as LORA
from dsee_scale.export.plan import base_files
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.export.report import REPORT_FILE, patterns_of
from dsee_scale.export.structure import find_structure

EXPERTS = ".experts."
"""In the name of what belongs to routed experts, together in one tensor or apart."""
KINDS = (*KINDS_WITH_ADAPTER, EXPORT, LORA)
PATTERNS = ((1, 4), (2, 4), (4, 8))
"""N:M patterns that are recognised in files, the strictest first."""


@dataclass(frozen=True)
class Matrix:
    """One weight and its zeros."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    pattern: str = "-"

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of entries that are zero."""
        return self.zeros / self.numel


@dataclass(frozen=True)
class FolderReport:
    """What was found; `str()` is a table for people, `to_dict()` plain values.

    Attributes:
        folder: where.
        kind: `adapter`, `lora`, `training_state`, `export` or `model`.
        facts: settings and totals, label -> value.
        matrices: weights with their zeros: the pruned ones of an adapter, all matrices of a model.
        files: sizes in bytes.
    """

    folder: str
    kind: str
    facts: dict[str, Any]
    matrices: tuple[Matrix, ...]
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{**asdict(m), "sparsity": m.sparsity} for m in self.matrices]
        return {"folder": self.folder, "kind": self.kind, **self.facts, "matrices": rows, "files": self.files}

    def table(self, *, each: bool = False) -> str:
        """Text for people; `each` lists every matrix in place of groups of equal name and shape."""
        lines = [f"{self.folder}: {self.kind.replace('_', ' ')}"]
        width = max(map(len, self.facts), default=0)
        lines += [f"  {label:<{width}}  {value}" for label, value in self.facts.items()]
        if self.matrices:
            wide = self._pattern_width
            lines += ["", f"  {'weights':<44} {'shape':>14} {'zeros':>8}  {'pattern':<{wide}}range"]
            lines += [f"  {line}" for line in (self._rows() if each else self._groups())]
        lines += ["", *(f"  {size / 1e6:>10,.3f} MB  {name}" for name, size in self.files.items())]
        lines.append(f"  {sum(self.files.values()) / 1e6:>10,.3f} MB  in all")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    @property
    def _pattern_width(self) -> int:
        return 2 + max(len("unstructured"), *(len(matrix.pattern) for matrix in self.matrices))

    def _rows(self) -> Iterable[str]:
        for m in self.matrices:
            yield f"{m.name:<44} {_shape(m.shape):>14} {100 * m.sparsity:7.2f}%  {m.pattern}"

    def _groups(self) -> Iterable[str]:
        groups: dict[tuple[str, tuple[int, ...]], list[Matrix]] = {}
        for m in self.matrices:
            parts = [part for part in m.name.split(".") if not part.isdigit()]
            groups.setdefault((".".join(parts[-3:]), m.shape), []).append(m)
        for (suffix, shape), members in groups.items():
            share = sum(m.zeros for m in members) / sum(m.numel for m in members)
            low, high = (f(m.sparsity for m in members) for f in (min, max))
            label = f"{len(members):4d} x {suffix}"
            pattern = ", ".join(sorted({m.pattern for m in members}))
            spread = f"{100 * low:.2f} to {100 * high:.2f}%"
            wide = self._pattern_width
            yield f"{label:<44} {_shape(shape):>14} {100 * share:7.2f}%  {pattern:<{wide}}{spread}"


def inspect_folder(folder: str | Path, *, verify: bool = False, progress: bool = False) -> FolderReport:
    """Read what a folder says about itself, and count the zeros of a model's matrices.

    Args:
        folder: an adapter, a training state, a LoRA (stock PEFT's too), an exported model, or any model folder with
            safetensors files.
        verify: compare every file with its hash (folders that dsee_scale saved).
        progress: show a bar while a model's weights are read.

    Raises:
        FormatError: a file is damaged or missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder")
    with damaged(path):
        return _inspect(path, verify, progress)


def _inspect(path: Path, verify: bool, progress: bool) -> FolderReport:
    stored = open_if_saved(path, KINDS)
    if verify and stored is not None:
        stored.verify_all()
    report = _report(path, stored, progress)
    if not verify:
        return report
    found = "nothing to compare with: no" if stored is None else f"all {len(stored.files)} files match"
    return replace(report, facts={**report.facts, "verified": f"{found} {MANIFEST}"})


def _report(path: Path, stored: StoredFolder | None, progress: bool) -> FolderReport:
    if is_lora_folder(path) and (stored is None or stored.kind == LORA):
        return _lora_report(path, stored)
    if stored is None:
        within = "" if any(path.glob("model*.safetensors")) else instead_of(path, KINDS)
        if within:
            raise FormatError(within)
        return _model_report(path, None, {}, progress)
    if stored.kind != EXPORT:
        return _adapter_report(stored)
    report = stored.json(REPORT_FILE)
    share = 100 * report["num_zero"] / max(report["num_pruned"], 1)
    facts = {
        "delta": report["delta"],
        "pruned": f"{share:.2f}% of {report['num_pruned']:,} entries are zero",
    }
    if report.get("structure"):
        facts["cut out"] = report["structure"]
    facts["loads with"] = report.get("loads_with", "transformers")
    if report.get("reason"):
        facts["loads with"] += f" (not in stock transformers: {report['reason']})"
    return _model_report(path, stored, facts, progress, report.get("num_removed", 0))


def _lora_report(path: Path, stored: StoredFolder | None) -> FolderReport:
    lora = open_lora(path)
    specs = [lora.reader.spec(name) for name in lora.reader.names()]
    facts = {
        "base": read_json(path / CONFIG_NAME).get("base_model_name_or_path") or "-",
        "adapter": f"rank {lora.rank} at most, for PEFT, vLLM and load_adapter",
        "modules": f"{len(lora.modules)} ({', '.join(_suffixes(lora.modules))})",
        "trainable": f"{sum(math.prod(spec.shape) for spec in specs):,} parameters",
    }
    sizes = {file.name: file.stat().st_size for file in (path / CONFIG_NAME, *lora.reader.paths)}
    if stored is not None:
        sizes = {name: record["size"] for name, record in stored.files.items()}
    return FolderReport(str(path), LORA, facts, (), sizes)


def _adapter_report(stored: StoredFolder) -> FolderReport:
    record = AdapterRecord.read(stored)
    config = record.config
    facts: dict[str, Any] = {"base": record.base.get("id") or "-", "class": record.base.get("class")}
    if config is not None:
        slices = f", output slices {config.output_slices}" if config.output_slices else ""
        facts |= {
            "adapter": f"rank {config.rank}, alpha {config.alpha:g}, {config.num_sparse} sparse entries per matrix "
            f"({config.support})",
            "modules": f"{len(record.modules)} ({', '.join(_suffixes(record.modules))}){slices}",
            "trainable": f"{record.num_trainable:,} parameters",
        }
        facts |= _adapted_experts(record)
    if record.trained:
        alike = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in record.trained)
        facts["trained in full"] = ", ".join(alike)
    matrices = tuple(
        Matrix(
            name,
            info["shape"],
            math.prod(info["shape"]) - info["kept"],
            " + ".join(patterns_of(info)),
        )
        for name, info in record.pruned.items()
        if _is_matrix(name, info["shape"])
    )
    if matrices:
        patterns = sorted({pattern for info in record.pruned.values() for pattern in patterns_of(info)})
        facts |= {"pattern": ", ".join(patterns), "sparsity": _overall(matrices)}
        if not set(patterns).isdisjoint(UNIT_PATTERNS):
            model = recorded_model(record.base, record.pruned, str(stored.path / CONFIG_FILE))
            structure = find_structure(model, lambda param: param.shape)
            facts["at export"] = structure.summary() if structure else "-"
    if stored.kind == TRAINING_STATE:
        state = stored.json(STATE_FILE)
        facts |= {
            "updates": max(state["steps"].values(), default=0),
            "ranks": state["world_size"],
            "extra": ", ".join(state["extra"]) or "-",
        }
    sizes = {name: record["size"] for name, record in stored.files.items()}
    return FolderReport(str(stored.path), stored.kind, facts, matrices, sizes)


def _model_report(
    folder: Path, stored: StoredFolder | None, facts: dict[str, Any], progress: bool, num_removed: int = 0
) -> FolderReport:
    reader = TensorReader(base_files(folder))
    matrices, entries, dtypes = [], 0, set()
    for name in tqdm(reader.names(), desc="read", disable=not progress):
        spec = reader.spec(name)
        entries += math.prod(spec.shape)
        dtypes.add(str(spec.dtype).removeprefix("torch."))
        if not (_is_matrix(name, spec.shape) and spec.dtype.is_floating_point):
            continue
        tensor = reader.read(name)
        reader.reject_not_finite(name, tensor)
        kept = count_nonzero(tensor)
        matrices.append(Matrix(name, spec.shape, tensor.numel() - kept, _pattern(tensor, kept)))
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = stored.json("config.json") if stored else read_json(folder / "config.json")
    facts = {
        "class": ", ".join(config.get("architectures") or ["-"]),
        **facts,
        "parameters": f"{entries:,} ({', '.join(sorted(dtypes))})",
        "sparsity": _overall(matrices),
        "deployment": _deployment(matrices, num_removed, entries),
    }
    sizes = {path.name: path.stat().st_size for path in reader.paths}
    return FolderReport(str(folder), EXPORT if stored else "model", facts, tuple(matrices), sizes)


def _adapted_experts(record: AdapterRecord) -> dict[str, str]:
    fused = [spec for spec in record.modules.values() if spec.experts]
    if not fused:
        return {}
    shared = ", A shared within each" if fused[0].shared_a else ""
    return {
        "experts": f"{sum(len(spec.slices) for spec in fused)} matrices in {len(fused)} parameters{shared}"
    }


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is one matrix, or those of a layer's experts; their biases, a row for each expert, are none."""
    fused = len(shape) == 3 and EXPERTS in name
    return (len(shape) == 2 or fused) and not name.endswith("bias")


def _pattern(tensor: Tensor, kept: int) -> str:
    """What the zeros of a matrix look like, or of each (E, M, J) expert; which way it lies a file doesn't say."""
    if tensor.numel() - kept < tensor.numel() / 100:
        return "-"
    for n, m in PATTERNS:
        for transposed in (False, True):
            inputs = tensor.shape[-2 if transposed else -1]
            if inputs % m == 0 and groups_hold(tensor.flatten(0, -2), n, m, transposed=transposed):
                return f"{n}:{m}" + (" (I x O)" if transposed else "")
    return "unstructured"


def _deployment(matrices: list[Matrix], num_removed: int, num_parameters: int) -> str:
    """What the zeros and the smaller shapes are worth to whoever runs the model."""
    gains = []
    if num_removed:
        share = 100 * num_removed / (num_removed + num_parameters)
        faster = f"about {2 * num_removed / 1e6:,.2f} MFLOPs less a token on any hardware"
        if any(EXPERTS in matrix.name for matrix in matrices):
            faster = "which saves memory: a token still goes to as many experts"
        gains.append(f"{share:.1f}% of the parameters cut out, {faster}")
    semi = sum(matrix.pattern in ("1:4", "2:4") and EXPERTS not in matrix.name for matrix in matrices)
    if semi:
        gains.append(f"{semi} matrices fit 2:4 kernels (NVIDIA: load_pretrained(..., semi_structured=True))")
    return "; ".join(gains) or "that of a dense model"


def _overall(matrices: Iterable[Matrix]) -> str:
    members = list(matrices)
    zeros, numel = sum(m.zeros for m in members), sum(m.numel for m in members)
    return f"{100 * zeros / max(numel, 1):.2f}% ({zeros:,} of {numel:,} entries in {len(members)} matrices)"


def _suffixes(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
