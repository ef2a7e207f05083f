"""How evenly whole matrices can be dealt to 8, 64 and 1,024 ranks: a simulation, without a rank or a network.

    python benchmarks/virtual_ranks.py [--json]

The lists of matrices are those of Llama-70B and of a mixture of 128 experts (94 blocks of Qwen3-235B's sizes). Dealing
and rounds are the passes' own code; a matrix costs what its arithmetic does, and transfers cost nothing.

- decompose: work of the slowest rank over the mean, a matrix costing its entries;
- decompose, in rounds: the same until the last rank is done, a rank waiting where it would be two rounds ahead of
  another, since all begin a round's transfer together and the next one's is under way meanwhile;
- re-fit: block by block, large matrices in pieces. First each wide input's Gram matrix is factorised by all ranks,
  panel after panel: a panel's own rank, then the slowest one at its later panels. Then each rank solves its pieces, and
  factorises narrow inputs' Gram matrices for itself. The mean is that of a rank alone, which factorises each once.

`bound` is the least that whole matrices allow: the largest matrix over the mean, or 1.
"""

from __future__ import annotations

import functools

from _report import Report, parser

from dsee_scale.passes.deal import deal, rounds
from dsee_scale.pruning.refit.matrix import factor_cost, rows_cost
from dsee_scale.pruning.refit.panels import PANEL, is_wide, panel_costs
from dsee_scale.pruning.refit.pieces import cut, deal_pieces

Sizes = list[tuple[int, int]]
MODELS: dict[str, list[list[Sizes]]] = {
    # blocks of inputs, of each the (outputs, inputs) of the matrices that read it
    "Llama-70B": [
        [
            [(8192, 8192), (1024, 8192), (1024, 8192)],
            [(8192, 8192)],
            [(28672, 8192), (28672, 8192)],
            [(8192, 28672)],
        ]
    ]
    * 80,
    "128 experts": [
        [[(8192, 4096), (512, 4096), (512, 4096)], [(4096, 8192)]]
        + [[(1536, 4096), (1536, 4096)], [(4096, 1536)]] * 128
    ]
    * 94,
}
ROUND_BYTES = 64 << 20


def main() -> None:
    """All cases."""
    report = Report("virtual_ranks", parser(__doc__).parse_args().json)
    for name, blocks in MODELS.items():
        for ranks in (8, 64, 1024):
            entries = [o * i for block in blocks for sizes in block for o, i in sizes]
            mean = sum(entries) / ranks
            bound = max(1.0, max(entries) / mean)
            owners = deal(entries, ranks)
            case = f"{name}, {ranks} ranks"
            slowest = max(loads(entries, owners, ranks))
            report.add(case, "decompose, slowest over mean", "1", slowest / mean, bound=bound)
            ends = last_end(entries, owners, ranks)
            report.add(case, "decompose, in rounds", "1", ends / mean, bound=bound)
            spent, alone = (sum(refit_work(block, count) for block in blocks) for count in (ranks, 1))
            report.add(case, "re-fit, slowest over mean", "1", spent * ranks / alone)


@functools.cache
def shared_factor_work(inputs: int, ranks: int) -> int:
    """Multiplications until all ranks have a wide Gram matrix's factor."""
    factoring, inverting = (deal(costs, ranks) for costs in panel_costs(inputs))
    heights = range(inputs, 0, -PANEL)
    work = max(loads(panel_costs(inputs)[1], inverting, ranks))
    for index, height in enumerate(heights):
        later = [PANEL * PANEL * each for each in heights[index + 1 :]]
        work += PANEL * PANEL * height // 2 + max(loads(later, factoring[index + 1 :], ranks))
    return work


def refit_work(block: list[Sizes], ranks: int) -> int:
    """Multiplications of the rank that takes longest to solve a block."""
    cuts = [
        (str(number), rows.stop - rows.start, inputs)
        for number, sizes in enumerate(block)
        for outputs, inputs in sizes
        for rows in cut(outputs, inputs)
    ]
    owners = deal_pieces(cuts, ranks)
    work = loads([rows_cost(rows, inputs) for _, rows, inputs in cuts], owners, ranks)
    narrow = {(n, i, owner) for (n, _, i), owner in zip(cuts, owners, strict=True) if not is_wide(i)}
    for _, inputs, owner in narrow:
        work[owner] += factor_cost(inputs)
    wide = [sizes[0][1] for sizes in block if is_wide(sizes[0][1])]
    return max(work) + sum(shared_factor_work(inputs, ranks) for inputs in wide)


def loads(costs: list[int], owners: list[int], ranks: int) -> list[int]:
    """Work of each rank."""
    total = [0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        total[owner] += cost
    return total


def last_end(costs: list[int], owners: list[int], ranks: int) -> int:
    """When the last rank is done with the last round."""
    ends, begun = [0] * ranks, 0
    for each in rounds([2 * cost for cost in costs], owners, ranks, ROUND_BYTES):
        starts = [max(end, begun) for end in ends]
        work = loads([costs[i] for i in each.indices], list(each.owners), ranks)
        ends, begun = [start + w for start, w in zip(starts, work, strict=True)], max(starts)
    return max(ends)


if __name__ == "__main__":
    main()
