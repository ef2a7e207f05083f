"""The model card, `README.md`, of what is exported: base, what was trained and removed, how to load it, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dsee_scale.config import UNIT_PATTERNS, DSEEConfig
from dsee_scale.export.report import ExportReport, patterns_of

CARD_FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How classes end that `AutoModelForCausalLM` finds."""


def export_card(
    report: ExportReport,
    *,
    base: str | None,
    tuned: DSEEConfig | None,
    pruned: Mapping[str, Mapping[str, Any]],
    model_class: str | None = None,
    notes: str = "",
) -> str:
    """The card of an exported model, with the metadata that the hub reads.

    Args:
        report: what was written.
        base: hub id or folder of the base model; of a folder the card tells the name alone.
        tuned: settings of the adapters, None where there were none.
        pruned: how each weight was pruned.
        model_class: of the model, in transformers.
        notes: further Markdown, such as what was measured.
    """
    stock = report.loads_with == "transformers"
    title = Path(report.folder).name
    loads = _stock_lines(title, model_class) if stock else _own_lines(repr(title))
    tuned = tuned if report.delta != "none" else None
    sections = [
        f"# {title}",
        f"{_done(tuned, pruned)}{_based_on(base)}, by [dsee_scale](https://arxiv.org/abs/2111.00160): "
        f"{_form(report.delta, tuned, pruned)}.",
        *_trained(tuned),
        *_removed(report, pruned),
        "## How to load it",
        f"```python\n{loads}\n```",
        *([] if stock else [f"Stock transformers cannot load it: {report.reason}."]),
        notes,
        "## Limits",
        _limits(pruned),
    ]
    data = _data(base, "transformers" if stock else "dsee_scale", ["sparse"] if pruned else [])
    return _card(data, sections)


def lora_card(
    title: str,
    *,
    base: str | None,
    tuned: DSEEConfig | None,
    rank: int,
    scope: str,
    model_class: str | None = None,
) -> str:
    """The card of a LoRA folder.

    Args:
        title: name of the folder.
        base: name or folder of the frozen weights.
        tuned: settings of the adapters.
        rank: largest rank in the files.
        scope: what a server must be told, one line.
        model_class: of the base, in transformers.
    """
    beside = base is not None and Path(base).name == "base" and Path(base).parent.name == title
    where = f"{title}/base" if beside else Path(base or "BASE").name if not is_hub_id(base) else base
    loader = _loader(model_class)
    loads = (
        f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
        f"base = {loader}.from_pretrained({str(where)!r})\n"
        f"model = PeftModel.from_pretrained(base, {title!r})"
    )
    sections = [
        f"# {title}",
        f"A LoRA of rank {rank} at most on {'the pruned weights in `base/`' if beside else str(where)}: the low-rank "
        "and the sparse part of a [dsee_scale](https://arxiv.org/abs/2111.00160) adapter, exactly.",
        *_trained(tuned),
        "## How to load it",
        f"```python\n{loads}\n```",
        scope,
    ]
    return _card(_data(base, "peft", ["lora"]), sections)


def adapter_card(title: str, *, base: str | None, model_class: str | None = None) -> str:
    """The card of an adapter in this package's own format.

    Args:
        title: its repository.
        base: hub id of the frozen weights, where it is known.
        model_class: of the base, in transformers.
    """
    loader = _loader(model_class)
    loads = (
        "import dsee_scale\nfrom huggingface_hub import snapshot_download\n"
        f"from transformers import {loader}\n\n"
        f"model = {loader}.from_pretrained({base or 'BASE'!r})\n"
        f"dsee_scale.load_adapter(model, snapshot_download({title!r}))"
    )
    sections = [
        f"# {title}",
        "An adapter of [dsee_scale](https://arxiv.org/abs/2111.00160): its low-rank and its sparse part, and which "
        f"weights of {base or 'its base'} were removed.",
        "## How to load it",
        f"```python\n{loads}\n```",
    ]
    return _card(_data(base, "dsee_scale", []), sections)


def moved_card(text: str, title: str, repo: str, base: str | None) -> str:
    """A folder's card for a repository: code loads from there, and the base is the one that others know.

    Args:
        text: the card.
        title: name of the folder.
        repo: OWNER/NAME.
        base: hub id of the base; None leaves what the card says.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    if base is not None:
        data: Any = card.data
        data.base_model = base
        card.text = card.text.replace(repr(f"{title}/base"), repr(base))
    loads = f"from huggingface_hub import snapshot_download\n{_own_lines(f'snapshot_download({repo!r})')}"
    card.text = card.text.replace(_own_lines(repr(title)), loads).replace(repr(title), repr(repo))
    return str(card)


def _card(data: ModelCardData, sections: Sequence[str]) -> str:
    text = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _data(base: str | None, library: str, tags: Sequence[str]) -> ModelCardData:
    known = base if is_hub_id(base) else None
    return ModelCardData(base_model=known, library_name=library, tags=["dsee", *tags])


def is_hub_id(base: str | None) -> bool:
    """Whether the hub may know it; a folder of this machine is none of its business."""
    return base is not None and HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def _done(tuned: DSEEConfig | None, pruned: Mapping[str, Any]) -> str:
    words = [*(["tuned"] if tuned else []), *(["pruned"] if pruned else [])]
    return " and ".join(words or ["saved"]).capitalize()


def _based_on(base: str | None) -> str:
    return "" if base is None else f" from {base if is_hub_id(base) else Path(base).name}"


def _form(delta: str, tuned: DSEEConfig | None, pruned: Mapping[str, Any]) -> str:
    """What stands in the files, as a formula and in words."""
    kept = "W * M" if pruned else "W"
    if delta == "none":
        return f"{kept}, the frozen base that adapters belong to"
    if tuned is None:
        return f"{kept}, without an update"
    if delta == "separate":
        return f"{kept}, with the adapter D in `adapter/`"
    if delta == "masked" and pruned:
        return "(W + D) * M: the update is in the weights, and the removed ones are zero"
    return f"{kept} + D: the update is in the weights"


def _trained(tuned: DSEEConfig | None) -> list[str]:
    if tuned is None:
        return []
    named = tuned.target_modules
    targets = named if isinstance(named, str) else ", ".join(named)
    sparse = tuned.num_sparse or 0
    rows = [
        ("rank, alpha", f"{tuned.rank}, {tuned.alpha:g}"),
        ("sparse entries per matrix", f"{sparse} ({tuned.support})" if sparse else "none"),
        ("adapted modules", targets),
        *([("trained in full", ", ".join(tuned.trained_modules))] if tuned.trained_modules else []),
    ]
    return ["## What was trained", _table(("setting", "value"), rows)]


def _removed(report: ExportReport, pruned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not pruned:
        return []
    groups: dict[str, list[float]] = {}
    for name, share in report.sparsity.items():
        if not name.endswith(".bias"):
            groups.setdefault(" and ".join(patterns_of(pruned[name])), []).append(100 * share)
    rows = [
        (
            pattern,
            str(len(shares)),
            f"{sum(shares) / len(shares):.2f}% ({min(shares):.2f}% to {max(shares):.2f}%)",
        )
        for pattern, shares in groups.items()
    ]
    found = ["## What was removed"]
    found += [f"{report.structure}."] if report.structure else []
    found.append(_table(("pattern", "matrices", "zeros in the files, mean (range)"), rows))
    return found


def _limits(pruned: Mapping[str, Mapping[str, Any]]) -> str:
    inside = any(info.get("pattern") not in UNIT_PATTERNS for info in pruned.values())
    zeros = (
        "Zeros within matrices make the files smaller when they are compressed; most runtimes multiply by them as by "
        "any number, so they buy no speed there. "
        if inside
        else ""
    )
    return f"{zeros}The base model's licence and limits hold for this model too; measure it on your own task."


def _stock_lines(title: str, model_class: str | None) -> str:
    loader = _loader(model_class)
    return f"from transformers import {loader}\n\nmodel = {loader}.from_pretrained({title!r})"


def _loader(model_class: str | None) -> str:
    """What loads a model of this class: itself, where it is no causal decoder and transformers has it."""
    import transformers

    own = model_class is not None and not model_class.endswith(CAUSAL) and hasattr(transformers, model_class)
    return str(model_class) if own else "AutoModelForCausalLM"


def _own_lines(folder: str) -> str:
    return f"import dsee_scale\n\nmodel = dsee_scale.load_pretrained({folder})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
