"""Which heads and neurons to remove: scores beside each other, on tuned SmolLM2-135M, nothing re-fitted or retuned.

    python examples/demo/demo_inputs.py
    python benchmarks/unit_scores.py --job e2e --files devset.csv [--quick] [--json]
    python benchmarks/unit_scores.py --job sentiment

Prints the held-out loss after a third of the heads, or a quarter of the neurons, of every layer went by each score;
the peer is a choice at random. The tuned start is that of `quality.py` (its --output is shared).
"""

from __future__ import annotations

import sys
from pathlib import Path

import dsee_scale
from dsee_scale import PruneConfig

sys.path.insert(0, str(Path(__file__).parent))
from _quality_lab import Lab, add_arguments, settle
from _quality_rows import UNITS, tuned_start
from _report import Report, parser

SCORES = ("random", "W", "ABS", "wanda")


def main() -> None:
    """Tune or take the tuned start, then prune it anew by each score."""
    arguments = parser(__doc__)
    add_arguments(arguments)
    arguments.add_argument("--seed", type=int, default=1)
    args = arguments.parse_args()
    if not settle(args):
        return
    lab, report = Lab(args), Report("unit_scores", args.json)
    calibration = lab.calibration(args.seed, 1)
    for units in UNITS:
        at_random = None
        for score in SCORES:
            model, *_ = tuned_start(lab, args.seed, args.steps)
            dsee_scale.prune(model, PruneConfig(**units, score=score, refit=False), calibration)
            loss = lab.quality(model)["loss"]
            at_random = loss if score == "random" else at_random
            case = f"{args.job}, {units['num_per_layer']} {units['pattern']} a layer by {score}"
            report.add(case, "loss", "nats", loss, at_random)


if __name__ == "__main__":
    main()
