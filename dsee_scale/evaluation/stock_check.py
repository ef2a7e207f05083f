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


def answer_nll(model, rows, device):
    """Negative log-likelihood of each answer of each row; right padding, full logits, no tricks."""
    if all(len(answer) == 1 for row in rows for answer in row["answers"]):
        log_p = forward(model, [row["prompt"] for row in rows], device)
        return [
            [-log_p[index, len(row["prompt"]) - 1, answer[0]].item() for answer in row["answers"]]
            for index, row in enumerate(rows)
        ]
    return [[sequence_nll(model, row["prompt"], answer, device) for answer in row["answers"]] for row in rows]


def sequence_nll(model, prompt, answer, device):
    """Negative log-likelihood of an answer after a prompt of at least one token."""
    log_p = forward(model, [prompt + answer], device)[0, len(prompt) - 1 : -1]
    return -log_p.gather(1, torch.tensor(answer, device=log_p.device)[:, None]).sum().item()


def forward(model, sequences, device):
    """Log-probabilities (rows, longest, vocabulary) in float32."""
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences], device=device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(dim=-1)


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
    order = sorted(range(len(request["rows"])), key=lambda i: len(request["rows"][i]["prompt"]))
    nll = [None] * len(order)
    for start in range(0, len(order), request["batch_size"]):
        chosen = order[start : start + request["batch_size"]]
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
