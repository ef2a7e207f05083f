"""What statistics and re-fitting cost, on a few blocks of a Llama of a billion parameters.

    python benchmarks/calibration.py [--json] [--quick] [--blocks 2]
    python benchmarks/calibration.py --only re-fit --blocks 16 --tokens 1024 --sequences 32 --batch 4 --rounds 1

- diagonal: `calibrate` on one batch of 2,048 tokens, against the forward pass alone (peer);
- Gram: one block's Gram matrices with the block's own pass, against that pass and the products X^T X alone (peer);
- solver: what the owner of a matrix does, against its matrix products and factorisation alone (peer);
- re-fit on 2 ranks against one (peer): `prune` of half of every matrix under ZeRO-3, the same --sequences of half of
  --tokens each in all, --batch at once, since each batch fetches all weights; and what it takes at its peak beyond the
  shard. The second line above is a whole model of a billion parameters and takes half an hour.

What is compared runs in turn, medians of the rounds, and by processor time besides, which a busy machine changes less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from _ranks import PeakMemory
from _report import Report, parser
from scale import SHAPES, build, run_on, runnable
from torch import Tensor, nn


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--sequences", type=int, default=4, help="of the re-fit on 2 ranks against one")
    arguments.add_argument("--batch", type=int, default=1, help="sequences of a batch there")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--only", choices=("statistics", "solver", "re-fit"))
    args = arguments.parse_args()
    if args.sequences % (2 * args.batch):
        arguments.error(
            f"--sequences {args.sequences} are no whole batches of {args.batch} for each of two ranks"
        )
    shape = "small" if args.quick else "1b"
    tokens, rounds = (128, 2) if args.quick else (args.tokens, args.rounds)
    report = Report("calibration", args.json)
    case = f"{args.blocks} blocks of {shape}, {tokens} tokens"
    if args.only in (None, "statistics"):
        torch.set_num_threads(args.threads)
        measure_statistics(report, case, model_of(shape, args.blocks), tokens, rounds)
    if args.only in (None, "solver"):
        torch.set_num_threads(args.threads)
        measure_solver(report, SHAPES[shape][1], SHAPES[shape][2], rounds)
    if args.only in (None, "re-fit"):
        rows = args.sequences, tokens // 2
        case = f"{args.blocks} blocks of {shape}, {rows[0]} x {rows[1]} tokens"
        runs = [run_on(ranks, refit_only, shape, args.blocks, rows, args.batch, rounds) for ranks in (2, 1)]
        medians = [tuple(max(r[key] for r in ranks) for key in ("wall", "cpu")) for ranks in runs]
        add(report, case, "re-fit, 2 ranks against 1", medians)
        two, one = (max(r["peak"] for r in ranks) / 2**20 for ranks in runs)
        report.add(case, "re-fit, peak beyond before, 2 ranks against 1", "MiB", two, one)


def model_of(shape: str, blocks: int) -> nn.Module:
    """Random bfloat16 weights in one process."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    _, hidden, width, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def measure_statistics(report: Report, case: str, model: nn.Module, tokens: int, rounds: int) -> None:
    import dsee_scale
    from dsee_scale.partition import open_partition
    from dsee_scale.passes.blocks import capture, find_blocks, run_block
    from dsee_scale.passes.inputs.watch import watching
    from dsee_scale.passes.pools import block_linears
    from dsee_scale.pruning.refit.block import add_gram_

    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch, partition = {"input_ids": ids}, open_partition(model)
    forward = lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)  # noqa: E731
    statistics_of = lambda: dsee_scale.calibrate(model, [batch], progress=False)  # noqa: E731
    add(report, case, "diagonal, against the forward pass", in_turn(rounds, statistics_of, forward))

    layers = block_linears(model)
    name, block = find_blocks(model, list(layers))[0]
    call = capture(model, [(name, block)], [batch], partition, torch.device("cpu"))[0]
    inputs: dict[str, Tensor] = {}
    inside = {n: layer for n, layer in layers.items() if n.startswith(f"{name}.")}
    # What layers share is taken once, as a re-fit takes it.
    with watching(inside, lambda n, x: inputs.__setitem__(n, x.clone()), again=lambda n: None):
        run_block(block, 0, call, call.hidden, model, partition)
    sums = {n: torch.zeros(x.shape[1], x.shape[1]) for n, x in inputs.items()}

    def gram_pass() -> None:
        def take(n: str, x: Tensor) -> None:
            add_gram_(sums[n], x.float())

        with watching({n: layers[n] for n in inputs}, take):
            run_block(block, 0, call, call.hidden, model, partition)

    wide = {n: x.float() for n, x in inputs.items()}

    def products_alone() -> None:
        run_block(block, 0, call, call.hidden, model, partition)
        for n, x in wide.items():
            torch.mm(x.t(), x, out=sums[n])

    add(report, case, "Gram pass, against its products", in_turn(rounds, gram_pass, products_alone))


@torch.no_grad()
def measure_solver(report: Report, hidden: int, width: int, rounds: int) -> None:
    """Half of a matrix's entries go; the products are those of the sweep and the steps after it."""
    from dsee_scale.algorithms.refit import NUM_STEPS, sparsegpt
    from dsee_scale.algorithms.sweep import Count

    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((hidden, hidden), (width, hidden), (hidden, width)):
        weight = torch.randn(outputs, inputs, generator=generator)
        x = torch.randn(1024, inputs, generator=generator)
        gram, w_IO = x.t() @ x / len(x), weight.t().contiguous()
        damped = gram + 0.1 * torch.eye(inputs)

        def products_alone(gram: Tensor = gram, w_IO: Tensor = w_IO, damped: Tensor = damped) -> None:
            torch.linalg.solve_triangular(torch.linalg.cholesky(damped), torch.eye(len(gram)), upper=False)
            torch.mm(gram[: len(gram) // 2], w_IO)  # each input's errors go to later ones alone
            for _ in range(NUM_STEPS + 1):
                torch.mm(gram, w_IO)

        def solver(weight: Tensor = weight, gram: Tensor = gram) -> None:
            sparsegpt(weight, gram, Count(weight.numel() // 2))

        case = f"{outputs} x {inputs}"
        add(report, case, "solver, against its products", in_turn(rounds, solver, products_alone))


def in_turn(rounds: int, *calls: Callable[[], Any]) -> list[tuple[float, float]]:
    """Median wall and processor seconds of each call, after one round that does not count."""
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for of_call, call in zip(times, calls, strict=True):
            started = time.perf_counter(), time.process_time()
            call()
            if number:
                of_call.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [tuple(statistics.median(column) for column in zip(*each, strict=True)) for each in times]  # type: ignore[misc]


def add(report: Report, case: str, metric: str, medians: list[tuple[float, float]]) -> None:
    ours, peer = medians
    report.add(case, metric, "s", ours[0], peer[0])
    report.add(case, f"{metric}, processor", "s", ours[1], peer[1])


def refit_only(shape: str, blocks: int, rows: tuple[int, int], batch: int, rounds: int) -> dict[str, Any]:
    """Collective. Seconds of re-fits, each of the model that the one before it left; bytes beyond what was there."""
    import dsee_scale
    from dsee_scale.partition import open_partition

    model = runnable(build(shape, blocks).requires_grad_(False))
    port = open_partition(model)
    generator = torch.Generator().manual_seed(0)
    sequences, length = rows
    batches = [
        {"input_ids": torch.randint(0, 1000, (batch, length), generator=generator)}
        for _ in range(sequences // batch)
    ]
    mine = batches[port.rank :: port.world_size]
    times, before = [], psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        for number in range(rounds):
            config = dsee_scale.PruneConfig(sparsity=0.5 + 0.01 * number)
            port.sum_over_ranks(torch.ones(1)).item()  # waits for every rank
            started = time.perf_counter(), time.process_time()
            dsee_scale.prune(model, config, mine, progress=False)
            times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {"wall": wall, "cpu": cpu, "peak": memory.peak - before}


if __name__ == "__main__":
    main()
