"""Does the exported folder do, in stock transformers, what the live model does?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsee_scale.data.encoding import IGNORED
from dsee_scale.distributed import raise_on_all_ranks, rank
from dsee_scale.errors import FormatError
from dsee_scale.evaluation import stock_check
from dsee_scale.evaluation.evaluate import EvaluationSet, Tally, add_choices
from dsee_scale.evaluation.stock_check import LOGIT_ROWS


def check_export(
    folder: Path,
    model: nn.Module,
    data: EvaluationSet,
    tokenizer: Any,
    *,
    batch_size: int,
    device: torch.device,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Collective. Score the exported folder in a fresh Python process that never imports dsee_scale.

    Rank 0 starts the process and waits for it; the others wait for rank 0.

    Args:
        folder: what `export_model` wrote, with its tokenizer.
        model: the live model, which is called on a few prompts for comparison.
        data: validation examples.
        tokenizer: the live tokenizer.
        batch_size: rows per forward pass.
        device: where the live model's inputs go.
        trust_remote_code: whether code that came with the model, and is in the folder, may run.

    Returns:
        On rank 0 `quality`, `max_logit_difference` to the live model, `same_tokens`, `seconds`; else {}.

    Raises:
        FormatError: the folder does not load.
    """
    rows = _rows(data)
    live = _live_logits(model, rows[:LOGIT_ROWS], device)
    texts = [tokenizer.decode(row["prompt"]) for row in rows[:LOGIT_ROWS]]
    request = {
        "folder": str(folder.resolve()),
        "trust_remote_code": trust_remote_code,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": _roomy_device(folder),
        "batch_size": batch_size,
        "rows": rows,
        "texts": texts,
    }

    with raise_on_all_ranks(what=f"reloading {folder} in stock transformers"):
        if rank():
            return {}
        answer = run_stock_check(request)
        differences = [
            (torch.tensor(a) - b).abs().max().item() for a, b in zip(answer["logits"], live, strict=True)
        ]
        return {
            "quality": _tally(data, answer["nll"]).metrics(),
            "max_logit_difference": max(differences),
            "same_tokens": answer["tokens"] == [tokenizer(text)["input_ids"] for text in texts],
            "dsee_scale_imported": answer["dsee_scale_imported"],
            "seconds": answer["seconds"],
        }


def run_stock_check(request: dict[str, Any]) -> dict[str, Any]:
    """Run `stock_check` as a program of its own, away from this package, and return its answer. Local."""
    program = Path(stock_check.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        question, answer = Path(work) / "request.json", Path(work) / "answer.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        # `-c` in an empty folder: nothing of this package is on the new process's path by accident.
        done = subprocess.run(
            [sys.executable, "-c", program, str(question), str(answer)],
            cwd=work,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise FormatError(f"{request['folder']} does not load in stock transformers:\n{tail}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _rows(data: EvaluationSet) -> list[dict[str, Any]]:
    """Prompts with their answers; plain text becomes its first token and the rest."""
    rows = [{"prompt": choice.prompt, "answers": choice.answers} for choice in data.choices]
    for ids, labels in data.answers:
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        rows.append({"prompt": ids[:start], "answers": [ids[start:]]})
    return rows


def _tally(data: EvaluationSet, nll: list[list[float]]) -> Tally:
    tally = Tally()
    add_choices(tally, data.choices, nll)
    for (_, labels), values in zip(data.answers, nll[len(data.choices) :], strict=True):
        tally.nll += values[0]
        tally.num_labels += sum(label != IGNORED for label in labels)
    return tally


@torch.no_grad()
def _live_logits(model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> list[torch.Tensor]:
    """Collective. Every rank runs the same prompts."""
    was_training = model.training
    model.eval()
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt"]], device=device)
        found.append(model(input_ids=ids).logits[0, -1].float().cpu())
    model.train(was_training)
    return found


def _roomy_device(folder: Path) -> str:
    """The GPU if the exported weights fit beside the live model, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free > 2 * nbytes + (4 << 30) else "cpu"
