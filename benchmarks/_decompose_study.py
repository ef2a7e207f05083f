"""The decomposition on a model's own weights: planted entries found, and what the support depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _planted import Planted, hard_threshold_loop, largest, plant, planted_matrix
from _report import Report
from safetensors.torch import load_file
from torch import Tensor

from dsee_scale.algorithms.decompose import find_support, low_rank
from dsee_scale.config import DecompositionConfig

PICKS = 64
RANKS = (4, 8, 16, 24, 32, 48, 64, 96)
NO_CLIP = 1e9
Choice = Callable[[Tensor], Tensor]


def study(report: Report, folder: Path, quick: bool) -> dict[str, Any]:
    """Add the study's cases to the report and return what the plot needs."""
    weights = linear_weights(folder)
    weights = weights[::6] if quick else weights
    findings: dict[str, Any] = {"model": folder.name, "matrices": len(weights)}
    findings["found"] = {
        "planted 768 x 768": found_by_rank(
            [planted_matrix(768, 768, seed=seed, heavy=heavy) for heavy in (False, True) for seed in (0, 1)]
        ),
        "real weights": found_by_rank(
            with_outliers(weights, heavy=False) + with_outliers(weights, heavy=True)
        ),
    }
    for where, curves in findings["found"].items():
        by_size = curves["magnitude"][0]
        for method, counts in curves.items():
            for rank, count in zip(RANKS, counts, strict=True):
                case = f"{where}: {method}" + ("" if method == "magnitude" else f", rank {rank}")
                if method != "magnitude" or rank == RANKS[0]:
                    report.add(case, f"found of {PICKS}, mean", "entries", count, by_size)
    findings["overlap"] = overlaps(weights)
    for change, share in findings["overlap"].items():
        report.add(f"support of {len(weights)} real weights: {change}", "share that stays", "", share)
    if not quick:
        reference_repeats(report, weights[::6])
    return findings


def linear_weights(folder: Path) -> list[Tensor]:
    """The linear weights of a model's blocks, from its `model.safetensors`."""
    tensors = load_file(folder / "model.safetensors")
    weights = [
        tensor.float()
        for name, tensor in sorted(tensors.items())
        if tensor.dim() == 2 and min(tensor.shape) >= 64 and "embed" not in name and "pooler" not in name
    ]
    if not weights:
        raise SystemExit(f"{folder}/model.safetensors holds no linear weight of at least 64 x 64")
    return weights


def with_outliers(weights: list[Tensor], *, heavy: bool) -> list[Planted]:
    """64 outliers in each weight, of 6.25 times its mean entry, or of 5 to 270 times."""
    times = 5.0 if heavy else 6.25
    return [
        plant(weight, PICKS, times * float(weight.abs().mean()), heavy=heavy, seed=index)
        for index, weight in enumerate(weights)
    ]


def chosen(weight: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    """Flat positions of the support with these decomposition settings."""
    generator = torch.Generator().manual_seed(seed)
    support = find_support(weight, PICKS, "grebsmo", DecompositionConfig(**settings), generator)
    return support.rows.long() * weight.shape[1] + support.cols


def found_by_rank(weights: list[Planted]) -> dict[str, list[float]]:
    """Mean number of planted entries found, for each method and rank."""

    def found(choice: Choice) -> float:
        return mean(planted.found(choice(planted.weight)) for planted in weights)

    by_size = found(lambda weight: largest(weight, PICKS))
    return {
        "magnitude": [by_size] * len(RANKS),
        "fast": [found(lambda w, r=rank: chosen(w, rank=r)) for rank in RANKS],
        "fast, no clip": [found(lambda w, r=rank: chosen(w, rank=r, clip=NO_CLIP)) for rank in RANKS],
        "hard threshold": [
            found(lambda w, r=rank: largest(w - hard_threshold_loop(w, r, 0), PICKS)) for rank in RANKS
        ],
    }


def overlaps(weights: list[Tensor]) -> dict[str, float]:
    """Mean share of the support that stays when one thing changes."""

    def share(first: Choice, second: Choice) -> float:
        return mean(float(torch.isin(first(weight), second(weight)).float().mean()) for weight in weights)

    result = {
        "float64 for float32": share(chosen, lambda w: chosen(w.double())),
        "bfloat16 for float32": share(chosen, lambda w: chosen(w.bfloat16())),
    }
    for iterations in (1, 2, 4, 8, 16):
        result[f"another seed, {iterations} iterations"] = share(
            lambda w, i=iterations: chosen(w, iterations=i),
            lambda w, i=iterations: chosen(w, seed=1, iterations=i),
        )
    for rank in RANKS:
        if rank != DecompositionConfig().rank:
            result[f"rank {rank} for 48"] = share(chosen, lambda w, r=rank: chosen(w, rank=r))
    result["no clip"] = share(chosen, lambda w: chosen(w, clip=NO_CLIP))
    result["magnitude"] = share(chosen, lambda w: largest(w, PICKS))
    return result


def reference_repeats(report: Report, real: list[Tensor]) -> None:
    """What the paper's loop leaves of a weight, and whether its choice can be repeated, in float64."""
    cases = {f"{len(real)} real weights": real}
    for noise in (0.007, 0.02):
        made = planted_matrix(768, 768, seed=0, noise=noise, dtype=torch.float64)
        cases[f"planted 768 x 768, noise {noise}"] = [made.weight]
    for name, weights in cases.items():
        left_over, stays = zip(*(_reference_twice(weight.double()) for weight in weights), strict=True)
        case = f"reference preset, fp64, {name}"
        report.add(case, "largest residual / weight", "", max(left_over))
        report.add(f"{case}, changed by 1e-15", "share that stays", "", mean(stays))


def _reference_twice(weight: Tensor) -> tuple[float, float]:
    settings = DecompositionConfig(preset="reference")
    picks = []
    for changed in (weight, weight * (1 + 1e-15)):
        left, right = low_rank(changed, settings, torch.Generator().manual_seed(0))
        residual = changed - left @ right
        picks.append(largest(residual, PICKS))
    left_over = float(residual.abs().amax() / weight.abs().amax())
    return left_over, float(torch.isin(*picks).float().mean())


def save_plot(findings: dict[str, Any], path: Path) -> None:
    """Two panels: planted entries found by rank, and what the support depends on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"magnitude": "0.55", "fast": "C0", "fast, no clip": "C1", "hard threshold": "C2"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 0.9))
    for axis, (where, curves) in zip(axes[:2], findings["found"].items(), strict=True):
        for method, counts in curves.items():
            axis.plot(
                RANKS,
                counts,
                color=colours[method],
                label=method,
                marker=None if method == "magnitude" else "o",
                markersize=3,
                linestyle="--" if method == "magnitude" else "-",
            )
        ticks = RANKS[:3] + RANKS[4::2] + RANKS[-1:]
        axis.set(xscale="log", xlabel="rank of L", title=where, ylim=(0, 66))
        axis.set_xticks(ticks, [str(rank) for rank in ticks])
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel(f"planted entries among {PICKS} picks")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    names = [name for name in findings["overlap"] if name != "rank 4 for 48"][::-1]
    axes[2].barh(names, [findings["overlap"][name] for name in names], color="C0", height=0.65)
    axes[2].set(xlim=(0, 1), title=f"support that stays, {findings['matrices']} real weights")
    axes[2].tick_params(axis="y", labelsize=7)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
