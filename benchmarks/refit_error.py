"""What a solver's settings do to single matrices: output error on held-out text after half, or more, of a matrix went.

    python examples/demo/demo_inputs.py
    python benchmarks/refit_error.py --job e2e --files devset.csv [--quick] [--json]

All linear layers of some blocks of untuned SmolLM2-135M, each with its own inputs of the dense model: Gram matrices
of the job's calibration rows to choose and solve by, those of its held-out rows to judge by (of sentences about films,
as many other training rows: no two of them have anything in common). Prints the mean over matrices of
|X (W - V)^T|^2 / |X W^T|^2; the peer is Wanda, which keeps the values of what stays.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dsee_scale.algorithms.refit import refit_kept, sparsegpt
from dsee_scale.algorithms.sweep import Count, Groups, Removal
from dsee_scale.passes.pools import block_linears

sys.path.insert(0, str(Path(__file__).parent))
from _quality_lab import Lab, add_arguments, settle
from _report import Report, parser

AMOUNTS = ("50%", "70%", "2:4")
Solve = Callable[[Tensor, Tensor, Removal], Tensor]
"""Weight, Gram matrix, how many go -> the pruned weight."""


def best(score: Tensor, removal: Removal) -> Tensor:
    """Which entries stay by a score, where so many go of every row, or of every group in it."""
    rows = score.unflatten(-1, (-1, removal.m)) if isinstance(removal, Groups) else score
    gone = removal.m - removal.n if isinstance(removal, Groups) else round(removal.num_remove / len(score))  # type: ignore[union-attr]
    order = rows.argsort(-1).argsort(-1)
    return (order >= gone).view_as(score)


def by_wanda(weight: Tensor, gram: Tensor, removal: Removal) -> Tensor:
    """Which entries stay."""
    return best(weight.abs() * gram.diagonal().sqrt(), removal)


SOLVERS: dict[str, Solve] = {
    "Wanda": lambda w, g, r: w * by_wanda(w, g, r),
    "magnitude": lambda w, g, r: w * best(w.abs(), r),
    "Wanda, the kept ones solved, damping 1%, 20 steps": lambda w, g, r: (
        refit_kept(w, g, by_wanda(w, g, r), damping=0.01, num_steps=20).weight
    ),
    **{
        f"sweep, damping {damping:.0%}, {steps} steps": lambda w, g, r, damping=damping, steps=steps: (
            sparsegpt(w, g, r, damping=damping, num_steps=steps).weight
        )
        for damping in (0.01, 0.1)
        for steps in (0, 5)
    },
}


def grams(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """X^T X of every layer's inputs at tokens that count, (I, I) float32."""
    found: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, x: Tensor) -> None:
        x_TI = x[mask].float()
        found[name] = found.get(name, 0) + x_TI.T @ x_TI

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model(**{key: value for key, value in batch.items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    return found


def held_out(lab: Lab, more: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches to judge by."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in lab.job.evaluation.answers]
    size = lab.job.batch_size
    return [lab.collate(rows[at : at + size]) for at in range(0, len(rows), size)] or more


def amount_of(words: str, weight: Tensor) -> Removal:
    """How many entries of a matrix go."""
    if words == "2:4":
        return Groups(2, 4)
    return Count(round(float(words.rstrip("%")) / 100 * weight.numel()))


def main() -> None:
    """Measure every solver on every matrix."""
    arguments = parser(__doc__)
    add_arguments(arguments)
    arguments.add_argument("--every", type=int, default=7, help="take each so many-th block")
    arguments.add_argument("--seed", type=int, default=1)
    args = arguments.parse_args()
    if not settle(args, quick_blocks=1):
        return
    lab, report = Lab(args), Report("refit_error", args.json)
    model, batches = lab.base().eval(), lab.batches(args.seed)
    names = [name for name in block_linears(model) if int(name.split(".")[2]) % args.every == 0]
    number = -(-args.num_calibration // lab.job.batch_size)
    seen, more = ([next(batches) for _ in range(number)] for _ in range(2))
    known, unknown = grams(model, names, seen), grams(model, names, held_out(lab, more))
    for amount in AMOUNTS[:1] if args.quick else AMOUNTS:
        peer = None
        for words, solve in SOLVERS.items():
            errors = []
            for name in names:
                weight, judge = model.get_submodule(name).weight.detach().float(), unknown[name]
                lost = weight - solve(weight, known[name], amount_of(amount, weight))
                errors.append(float(((lost @ judge) * lost).sum() / ((weight @ judge) * weight).sum()))
            error = statistics.mean(errors)
            peer = peer or error
            report.add(f"{args.job}, {amount}, {words}", "error", "1", error, peer, matrices=len(names))


if __name__ == "__main__":
    main()
