"""A program that judges an exported folder with stock transformers only; it never imports dsee_scale.

`export_check` runs this file's text in a fresh Python: `python -c TEXT REQUEST.json ANSWER.json`.
REQUEST: {"folder": ..., "trust_remote_code": false, "dtype": ..., "device": ..., "batch_size": ..., "texts": [...],
"rows": [{"prompt": [token, ...], "answers": [[token, ...], ...]}, ...]}.
ANSWER: {"nll": [[one per answer], ...] for each row, "tokens": ids of each text, "logits": of the first rows
at their last prompt position, "dsee_scale_imported": false, "seconds": ...}.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGIT_ROWS = 4
MOST_LOGITS = 2**27
"""Entries of the logits of a batch at most, unless one row alone has more."""
POSITIONS = 20
"""Positions whose logits are taken to float32 together."""


def answer_nll(model, rows, device):
    """Negative log-likelihood of each answer of each row; right padding, full logits, no tricks."""
    if all(len(answer) == 1 for row in rows for answer in row["answers"]):
        logits = forward(model, [row["prompt"] for row in rows], device)
        last = [log_softmax(logits[index, len(row["prompt"]) - 1]) for index, row in enumerate(rows)]
        return [
            [-log_p[answer[0]].item() for answer in row["answers"]]
            for log_p, row in zip(last, rows, strict=True)
        ]
    return [[sequence_nll(model, row["prompt"], answer, device) for answer in row["answers"]] for row in rows]


def sequence_nll(model, prompt, answer, device):
    """Negative log-likelihood of an answer after a prompt of at least one token."""
    logits = forward(model, [prompt + answer], device)[0, len(prompt) - 1 : -1]
    targets = torch.tensor(answer, device=logits.device)[:, None]
    parts = zip(logits.split(POSITIONS), targets.split(POSITIONS), strict=True)
    return -sum(log_softmax(part).gather(1, wanted).double().sum().item() for part, wanted in parts)


def log_softmax(logits):
    """Log-probabilities in float32."""
    return logits.float().log_softmax(dim=-1)


def forward(model, sequences, device):
    """Logits (rows, longest, vocabulary)."""
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences], device=device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def batches(rows, size, vocabulary):
    """Indices of rows of similar length, so many that neither they nor their logits are too many."""
    chosen: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"])):
        logits = (len(chosen) + 1) * len(rows[index]["prompt"]) * vocabulary
        if chosen and (len(chosen) == size or logits > MOST_LOGITS):
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


def main(request_path, answer_path):
    """Load, score, write."""
    started = time.perf_counter()
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    trust = {"trust_remote_code": request["trust_remote_code"]}
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], **trust)
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, **trust)
    model = model.to(request["device"]).eval()
    nll = [None] * len(request["rows"])
    for chosen in batches(request["rows"], request["batch_size"], model.config.get_text_config().vocab_size):
        values = answer_nll(model, [request["rows"][i] for i in chosen], request["device"])
        for index, value in zip(chosen, values, strict=True):
            nll[index] = value
    logits = []
    for row in request["rows"][:LOGIT_ROWS]:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row["prompt"]], device=request["device"])).logits[0, -1]
        logits.append(found.float().tolist())
    answer = {
        "nll": nll,
        "tokens": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "logits": logits,
        "dsee_scale_imported": "dsee_scale" in sys.modules,
        "seconds": time.perf_counter() - started,
    }
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
