"""Generated texts in the files that the data-to-text challenges' scorers read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsee_scale.evaluation.evaluate import corpus_bleu


def write_scorer_files(
    folder: Path, prompts: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Write one run's texts. Local.

    `hypotheses.txt`: one a line. `references.txt`: the references of each, a blank line after them (E2E's
    scorer). `reference0`, `reference1`, ...: one a line, empty where there are fewer (WebNLG's and DART's).
    `outputs.jsonl`: all of it. `metrics.json`: BLEU by sacrebleu.

    Returns:
        What stands in `metrics.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = [_line(text) for text in hypotheses]
    found = [[_line(text) for text in group] for group in references]
    _write(folder / "hypotheses.txt", texts)
    _write(folder / "references.txt", [line for group in found for line in (*group, "")])
    for index in range(max(map(len, found))):
        _write(folder / f"reference{index}", [group[index] if index < len(group) else "" for group in found])
    rows = zip(prompts, texts, found, strict=True)
    keys = ("prompt", "hypothesis", "references")
    _write(
        folder / "outputs.jsonl",
        [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in rows],
    )
    metrics = {"bleu": corpus_bleu(texts, found), "prompts": len(texts), "references": sum(map(len, found))}
    _write(folder / "metrics.json", [json.dumps(metrics, indent=2)])
    return metrics


def _line(text: str) -> str:
    return " ".join(text.split())


def _write(path: Path, lines: Sequence[str]) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    draft.replace(path)
