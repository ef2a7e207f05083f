"""Does the exported folder do, in stock transformers, what the live model does?"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dsee_scale.data.encoding import IGNORED
from dsee_scale.distributed import from_rank0, log_rank0, meet_until, raise_on_all_ranks, rank
from dsee_scale.errors import FormatError
from dsee_scale.evaluation import stock_check
from dsee_scale.evaluation.evaluate import EvaluationSet, Tally, add_choices
from dsee_scale.evaluation.stock_check import LOGIT_ROWS

logger = logging.getLogger(__name__)


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

    Rank 0 starts the process. While it runs all ranks meet every few seconds, however long it takes: none waits for
    another one until the process group's timeout. Where the exported weights fit into no memory that is free, nothing
    is checked, and a warning says so.

    Args:
        folder: what `export_model` wrote, with its tokenizer.
        model: the live model, which is called on a few prompts for comparison.
        data: validation examples.
        tokenizer: the live tokenizer.
        batch_size: rows per forward pass.
        device: where the live model's inputs go.
        trust_remote_code: whether code that came with the model, and is in the folder, may run.

    Returns:
        On rank 0 `quality`, `max_logit_difference` to the live model, `same_tokens`, `seconds`; elsewhere, and where
        nothing was checked, {}.

    Raises:
        FormatError: the folder does not load.
    """
    where = from_rank0(_roomy_device(folder) if rank() == 0 else None)
    if where is None:
        log_rank0(
            logger, "%s was not checked: it needs more memory than is free beside the live model", folder
        )
        return {}
    rows = _rows(data)
    live = _live_logits(model, rows[:LOGIT_ROWS], device)
    texts = [tokenizer.decode(row["prompt"]) for row in rows[:LOGIT_ROWS]]
    request = {
        "folder": str(folder.resolve()),
        "trust_remote_code": trust_remote_code,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": where,
        "batch_size": batch_size,
        "rows": rows,
        "texts": texts,
    }
    what = f"reloading {folder} in stock transformers"
    answer = _ask(request, device, what)
    with raise_on_all_ranks(what=what):
        tokens = [tokenizer(text)["input_ids"] for text in texts]
        return {} if answer is None else _compared(answer, data, live, tokens)


def _ask(request: dict[str, Any], device: torch.device, what: str) -> dict[str, Any] | None:
    """Collective. What the other process answers, on rank 0."""
    with raise_on_all_ranks(what=what):
        check = None if rank() else StockCheck(request)
    try:
        meet_until(None if check is None else check.ended, device=device)
        with raise_on_all_ranks(what=what):
            return None if check is None else check.answer()
    finally:
        if check is not None:
            check.close()


def _compared(
    answer: dict[str, Any], data: EvaluationSet, live: list[torch.Tensor], tokens: list[list[int]]
) -> dict[str, Any]:
    """What the other process found beside what the live model and tokenizer give."""
    pairs = zip(answer["logits"], live, strict=True)
    return {
        "quality": _tally(data, answer["nll"]).metrics(),
        "max_logit_difference": max((torch.tensor(a) - b).abs().max().item() for a, b in pairs),
        "same_tokens": answer["tokens"] == tokens,
        "dsee_scale_imported": answer["dsee_scale_imported"],
        "seconds": answer["seconds"],
    }


class StockCheck:
    """`stock_check` as a program of its own, away from this package. Local.

    Raises:
        FormatError: the folder does not load.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._folder, self._work = request["folder"], tempfile.TemporaryDirectory()
        work = Path(self._work.name)
        self._question, self._answer, self._errors = (work / name for name in ("request", "answer", "errors"))
        self._question.write_text(json.dumps(request), encoding="utf-8")
        program = Path(stock_check.__file__).read_text(encoding="utf-8")
        # `-c` in an empty folder: nothing of this package is on the new process's path by accident.
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(self._question), str(self._answer)],
                cwd=work,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def ended(self, seconds: float) -> bool:
        """Whether it is over, after waiting so long at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def answer(self) -> dict[str, Any] | None:
        """What it found, once it has ended; None, and a warning, where it ran out of memory."""
        if self._process.returncode:
            said = self._errors.read_text(encoding="utf-8", errors="replace")
            if self._process.returncode == -signal.SIGKILL or "OutOfMemoryError" in said:
                logger.warning("%s was not checked: the check ran out of memory", self._folder)
                return None
            tail = "\n".join(said.strip().splitlines()[-5:])
            raise FormatError(f"{self._folder} does not load in stock transformers:\n{tail}")
        return json.loads(self._answer.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End it, and forget its files."""
        self._process.kill()
        self._process.wait()
        self._work.cleanup()


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


def _roomy_device(folder: Path) -> str | None:
    """The GPU if the exported weights fit beside the live model, or the CPU; None if into neither. Local."""
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what training has used and PyTorch keeps is free
        if torch.cuda.mem_get_info()[0] > 2 * nbytes + (4 << 30):
            return "cuda"
    return "cpu" if psutil.virtual_memory().available > 1.2 * nbytes + (1 << 30) else None
