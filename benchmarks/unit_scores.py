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

import torch

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.recipe.parsing import cache_folder

sys.path.insert(0, str(Path(__file__).parent))
from _quality_jobs import CALIBRATION, METRIC, RATE
from _quality_lab import Lab
from _quality_rows import UNITS, tuned_start
from _report import Report, parser
from quality import shortened

SCORES = ("random", "W", "ABS", "wanda")


def main() -> None:
    """Tune or take the tuned start, then prune it anew by each score."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(cache_folder() / "smollm2-135m-instruct"))
    arguments.add_argument("--job", choices=list(METRIC), default="sentiment")
    arguments.add_argument("--files", type=Path, nargs="+", help="the job's data, see quality.py")
    arguments.add_argument("--steps", type=int, default=30, help="of tune")
    arguments.add_argument(
        "--retune_steps", type=int, default=60, help="that the learning rate is to span besides"
    )
    arguments.add_argument("--num_calibration", type=int)
    arguments.add_argument("--num_eval", type=int, default=128, help="held-out rows")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--output", default="runs/quality")
    args = arguments.parse_args()
    args.rate, args.trained_norms = RATE[args.job], False
    args.num_calibration = args.num_calibration or CALIBRATION[args.job]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.files is None:
        args.files = [cache_folder() / "movie-sentiment" / f"{part}.csv" for part in ("train", "validation")]
    if args.quick:
        args.steps, args.num_eval, args.num_calibration, args.output = 1, 16, 16, f"{args.output}-quick"
        args.model = shortened(args.model, Path(args.output) / "shortened")
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
