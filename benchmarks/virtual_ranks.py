"""How evenly whole matrices can be dealt to 8, 64 and 1,024 ranks: a simulation, without a rank or a network.

    python benchmarks/virtual_ranks.py [--json]

The lists of matrices are those of Llama-70B and of a mixture of 128 experts (94 blocks of Qwen3-235B's sizes). Dealing
and rounds are the passes' own code; a matrix costs what its arithmetic does, and transfers cost nothing.

- decompose: work of the slowest rank over the mean, a matrix costing its entries;
- decompose, in rounds: the same until the last rank is done, a rank waiting where it would be two rounds ahead of
  another, since all begin a round's transfer together and the next one's is under way meanwhile;
- re-fit: matrices are dealt block by block, so a dense block with seven of them keeps seven ranks busy at most.

`bound` is the least that whole matrices allow: the largest matrix over the mean, or 1.
"""

from __future__ import annotations

from _report import Report, parser

from dsee_scale.passes.deal import deal, rounds
from dsee_scale.pruning.refit.matrix import solver_cost

Sizes = list[tuple[int, int]]
MODELS: dict[str, list[Sizes]] = {
    # blocks of (outputs, inputs)
    "Llama-70B": [[(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]] * 80,
    "128 experts": [
        [(8192, 4096), (4096, 8192)] + [(512, 4096)] * 2 + [(1536, 4096), (1536, 4096), (4096, 1536)] * 128
    ]
    * 94,
}
ROUND_BYTES = 64 << 20


def main() -> None:
    report = Report("virtual_ranks", parser(__doc__).parse_args().json)
    for name, blocks in MODELS.items():
        for ranks in (8, 64, 1024):
            entries = [o * i for block in blocks for o, i in block]
            mean = sum(entries) / ranks
            bound = max(1.0, max(entries) / mean)
            owners = deal(entries, ranks)
            case = f"{name}, {ranks} ranks"
            slowest = max(loads(entries, owners, ranks))
            report.add(case, "decompose, slowest over mean", "1", slowest / mean, bound=bound)
            ends = last_end(entries, owners, ranks)
            report.add(case, "decompose, in rounds", "1", ends / mean, bound=bound)
            costs = [[solver_cost(o, i) for o, i in block] for block in blocks]
            spent = sum(max(loads(block, deal(block, ranks), ranks)) for block in costs)
            report.add(case, "re-fit, slowest over mean", "1", spent * ranks / sum(map(sum, costs)))


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
