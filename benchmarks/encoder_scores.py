"""The paper's second stage on an encoder, all-MiniLM-L6-v2 on movie sentences, by ABS and by wanda.

    python benchmarks/encoder_scores.py [--json] [--quick] [--seeds 1 2 3]

DSEE tunes query and value (rank 16, N = 64) and the classifier; then 20%, 50% or 70% of the block weights go, and
it trains on for as many steps. ABS is set up as in the paper: one threshold for the adapted matrices, one for all
others, updates beside the mask. Every row of a seed starts from the same tuned model. Accuracy on held-out sentences;
peer is the tuned model's. One process.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.config import paper_pools

sys.path.insert(0, str(Path(__file__).parent))
from _report import Report, parser
from pruned_forward import accuracy, batch_of, minilm, sentences, train

SHARES = (0.2, 0.5, 0.7)
STAGES = {
    "ABS, two pools": lambda share: PruneConfig(
        score="ABS", pools=paper_pools(share, share), mask_update=False
    ),
    "wanda alone": lambda share: PruneConfig(sparsity=share, refit=False),
    "wanda and re-fit": lambda share: PruneConfig(sparsity=share),
}
CONFIG = {"rank": 16, "alpha": 32, "num_sparse": 64, "target_modules": ("query", "value")}


def measure(seed: int, shares: Sequence[float], steps: int, rows: int, work: Path) -> dict[str, float]:
    """Accuracy by case: tuned, and of each stage right after the pruning and after as many steps again."""
    data = {name: sentences(name) for name in ("train", "validation")}
    test = data["validation"][:rows]
    model, tokenizer = minilm(work)
    dsee_scale.inject(model, DSEEConfig(**CONFIG, trained_modules=("classifier",), seed=seed))
    train(model, tokenizer, optimizer_of(model), data["train"], steps, seed=seed)
    dsee_scale.save_adapter(model, work / "tuned", overwrite=True)
    found = {"tuned": accuracy(model, tokenizer, test)}
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    rows_seen = [data["train"][index] for index in order[:256]]
    calibration = [batch_of(tokenizer, rows_seen[start : start + 32]) for start in range(0, 256, 32)]
    for share in shares:
        for name, config in STAGES.items():
            model, _ = minilm(work)
            dsee_scale.load_adapter(model, work / "tuned")
            dsee_scale.prune(model, config(share), None if name.startswith("ABS") else calibration)
            found[f"{share:.0%}, {name}: pruned"] = accuracy(model, tokenizer, test)
            train(model, tokenizer, optimizer_of(model), data["train"], steps, seed=100 + seed)
            found[f"{share:.0%}, {name}: retuned"] = accuracy(model, tokenizer, test)
    return found


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """A fresh one: the tuned start is read from a file."""
    return torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-3)


def main() -> None:
    """Measure every seed, print means; the spread over seeds besides."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments.add_argument(
        "--steps", type=int, default=50, help="of 32 sentences, before and after the pruning"
    )
    arguments.add_argument("--num_eval", type=int, default=1000)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.steps, args.num_eval = [1], 1, 32
    shares = SHARES[1:2] if args.quick else SHARES
    report = Report("encoder_scores", args.json)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [measure(seed, shares, args.steps, args.num_eval, Path(folder)) for seed in args.seeds]
    tuned = statistics.mean(found["tuned"] for found in seeds)
    for case in seeds[0]:
        values = [found[case] for found in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        report.add(case, "accuracy", "fraction", statistics.mean(values), tuned, spread=round(spread, 4))


if __name__ == "__main__":
    main()
