"""An exact global mask, selected and written in place, against torch.nn.utils.prune.global_unstructured.

One CPU thread. Times hold everything from the weights to the zeros in them; extra memory is the growth of
the process's peak resident memory, taken in a fresh process. Plain torch loops are what a pool of this
size uses; compiled ones (extra `fast`) begin at `compiled.LOAD_FROM` entries, where compiling pays, and
their times are without compiling. `same_weights` compares with the peer's mask: of entries that tie exactly
at the threshold the peer removes arbitrary ones, and here the first ones go; no other difference is allowed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import Report, parser, seconds_of
from torch import Tensor, nn
from torch.nn.utils import prune

from dsee_scale.algorithms.delta import AdapterSpec, Delta
from dsee_scale.algorithms.score import Ranking, key_bits, ranked_blocks
from dsee_scale.algorithms.select import apply_cut_, global_cut, num_removed

SIDE, QUICK_SIDE = 4096, 1024
SPARSITY = 0.5
LOOPS = {"torch loops": False, "compiled": True}


def make_weights(side: int, dtype: torch.dtype, count: int = 2, values: int | None = None) -> list[Tensor]:
    """Random weights, or weights of a few distinct values."""
    generator = torch.Generator().manual_seed(0)
    if values is not None:
        return [torch.randint(values, (side, side), generator=generator).to(dtype) + 1 for _ in range(count)]
    return [(torch.randn(side, side, generator=generator) * 0.02).to(dtype) for _ in range(count)]


def mask_in_place(weights: list[Tensor], rankings: list[Ranking], use_compiled: bool | None) -> int | Tensor:
    """What `dsee_scale.prune` does with one pool that lies in one process."""
    total = sum(weight.numel() for weight in weights)
    starts = [sum(weight.numel() for weight in weights[:i]) for i in range(len(weights))]

    def blocks(wants: Any = None) -> Iterator[tuple[Tensor, Tensor, int]]:
        for weight, start, ranking in zip(weights, starts, rankings, strict=True):
            here = None if wants is None else lambda at, n, start=start: wants(start + at, n)
            for entries, ranked, position in ranked_blocks(weight.view(-1), 0, ranking, here):
                yield entries, ranked, start + position

    cut = global_cut(
        lambda wants: ((ranked, position) for _, ranked, position in blocks(wants)),
        num_removed(SPARSITY, total),
        total,
        key_bits(rankings, [weight.dtype for weight in weights]),
        use_compiled=use_compiled,
    )
    return sum(apply_cut_(*block, cut, use_compiled=use_compiled) for block in blocks())


def magnitude(weights: list[Tensor]) -> list[Ranking]:
    return [Ranking(mode="W", name=str(i)) for i in range(len(weights))]


def peer_modules(weights: list[Tensor]) -> list[nn.Linear]:
    modules = []
    for weight in weights:
        module = nn.Linear(*weight.shape, bias=False, device="meta")
        module.weight = nn.Parameter(weight.clone())
        modules.append(module)
    return modules


def peer_mask(modules: list[nn.Linear]) -> None:
    prune.global_unstructured([(m, "weight") for m in modules], prune.L1Unstructured, amount=SPARSITY)


def same_weights(original: list[Tensor], ours: list[Tensor], modules: list[nn.Linear]) -> bool:
    """Whether both removed the same number, and the same entries but for ties at the threshold."""
    gone = torch.cat([weight.view(-1) == 0 for weight in ours])
    peer_gone = torch.cat([module.weight_mask.view(-1) == 0 for module in modules])
    size = torch.cat([weight.view(-1) for weight in original]).abs()
    differ = gone != peer_gone
    threshold = size[gone].max()
    return bool(gone.sum() == peer_gone.sum()) and bool((size[differ] == threshold).all())


def against_peer(report: Report, case: str, weights: list[Tensor], repeats: int) -> None:
    """Time ours and the peer in turn, each on fresh copies."""
    times: dict[str, list[float]] = {name: [] for name in (*LOOPS, "peer")}
    same = []
    for _ in range(repeats):
        modules = peer_modules(weights)
        times["peer"].append(seconds_of(lambda modules=modules: peer_mask(modules)))
        for name, use_compiled in LOOPS.items():
            ours = [weight.clone() for weight in weights]
            run = lambda ours=ours, use=use_compiled: mask_in_place(ours, magnitude(ours), use)  # noqa: E731
            times[name].append(seconds_of(run))
            same.append(same_weights(weights, ours, modules))
    peer = statistics.median(times.pop("peer"))
    for name, seconds in times.items():
        report.add(
            f"{case}, {name}",
            "select and mask",
            "s",
            statistics.median(seconds),
            peer,
            same_weights=all(same),
        )


def rate(report: Report, case: str, weights: list[Tensor], rankings: list[Ranking], repeats: int) -> None:
    """Weights a second through count, tie and write, compiled and not."""
    total = sum(weight.numel() for weight in weights)
    for name, use_compiled in LOOPS.items():
        times = []
        for _ in range(repeats):
            ours = [weight.clone() for weight in weights]
            run = lambda ours=ours, use=use_compiled: mask_in_place(ours, rankings, use)  # noqa: E731
            times.append(seconds_of(run))
        millions = total / statistics.median(times) / 1e6
        report.add(f"{case}, {name}", "rate", "million weights/s", millions)


def adapter(side: int, rank: int = 16, num_sparse: int = 64) -> Delta:
    generator = torch.Generator().manual_seed(1)
    spec = AdapterSpec(
        shape=(side, side),
        transposed=False,
        slices=((0, side),),
        rank=rank,
        num_sparse=num_sparse,
        scaling=2.0,
    )
    return Delta(
        spec,
        a=torch.randn(rank, side, generator=generator) * 0.02,
        b=torch.randn(side, rank, generator=generator) * 0.02,
        values=torch.randn(num_sparse, generator=generator) * 0.02,
        rows=torch.randint(side, (num_sparse,), generator=generator).sort().values.int(),
        cols=torch.randint(side, (num_sparse,), generator=generator).int(),
    )


def peak_kib() -> int:
    """Highest resident memory of this process since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(side: int, use_compiled: bool) -> None:
    """In a fresh process: MiB on top of the weights, and MiB that loading the compiled loops took."""
    weights = make_weights(side, torch.float32)
    reset_peak()
    before = peak_kib()
    if use_compiled:
        warm_up(use_compiled)
    loading = peak_kib() - before
    reset_peak()
    before = peak_kib()
    mask_in_place(weights, magnitude(weights), use_compiled)
    print((peak_kib() - before) / 1024, loading / 1024)


def memory(report: Report, case: str, side: int) -> None:
    for name in LOOPS:
        command = [sys.executable, __file__, "--memory-of", name, "--side", str(side)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        extra, loading = map(float, printed.split())
        report.add(f"{case}, {name}", "extra peak memory", "MiB", extra, loading_once_mib=loading)


def warm_up(use_compiled: bool) -> None:
    """Compile for all combinations of weight and key widths."""
    for dtype in (torch.float32, torch.bfloat16):
        small = make_weights(64, dtype)
        mask_in_place(small, magnitude(small), use_compiled)
        mask_in_place(small, [Ranking(mode="random", name=str(i)) for i in range(2)], use_compiled)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--memory-of", choices=LOOPS, help="measure the memory of one case in this process"
    )
    arguments.add_argument("--side", type=int, help="side of the square weights")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    side = options.side or (QUICK_SIDE if options.quick else SIDE)
    if options.memory_of:
        measure_memory(side, LOOPS[options.memory_of])
        return
    report = Report("masks", options.json)
    try:
        seconds = seconds_of(lambda: warm_up(True))
        report.add("compiling, once per process", "time", "s", seconds)
    except RuntimeError:
        del LOOPS["compiled"]
    count = f"{2 * side * side / 1e6:.1f}M"
    memory(report, f"{count} fp32", side)
    against_peer(report, f"{count} fp32", make_weights(side, torch.float32), repeats=3)
    against_peer(report, f"{count} bf16", make_weights(side, torch.bfloat16), repeats=3)
    ties = make_weights(side, torch.float32, values=5)
    against_peer(report, f"{count} fp32, 5 distinct values", ties, repeats=1)
    many = make_weights(side, torch.bfloat16, count=8)
    rate(report, f"{4 * 2 * side * side / 1e6:.1f}M bf16", many, magnitude(many), repeats=3)
    adapted = make_weights(side, torch.bfloat16, count=1)
    rankings = [Ranking(mode="WABS", name="0", delta=adapter(side))]
    rate(report, f"{side * side / 1e6:.1f}M bf16, score WABS, rank 16", adapted, rankings, repeats=3)


if __name__ == "__main__":
    main()
