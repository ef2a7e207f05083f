"""Prune and re-fit block after block: what stays is solved anew, so that each layer does what the tuned one did.

Per block: run it over the calibration data for the Gram matrices X^T X of its layers' inputs; sum each to the ranks
that need it; solve there, on W + D, large matrices in pieces; scatter the new weights into the shards; run the block
again for the next one's inputs. So later blocks see what earlier ones do after pruning. The new weight leaves room for
BA, which goes on with its optimizer state; S2 starts again at zero, on a support among the entries that stay. Each
expert's matrices are solved for the tokens that are routed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.algorithms.decompose import Support
from dsee_scale.algorithms.delta import Delta
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import show_progress
from dsee_scale.errors import ConfigError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.passes.batches import (
    Batches,
    compute_device,
    evaluating,
    reject_uncounted,
    release_heap,
)
from dsee_scale.passes.blocks import Call, advance, capture
from dsee_scale.passes.calibrate import Statistics
from dsee_scale.passes.inputs.watch import InputSquares, agreed_leaders, watching
from dsee_scale.passes.pools import WeightPool
from dsee_scale.pruning.checks import note_pattern
from dsee_scale.pruning.half_done import stopped
from dsee_scale.pruning.refit.block import (
    adapter_params,
    collect_grams,
    grouped,
    own_weights,
    request_for,
    reserve,
    whole_pieces,
    write_back,
)
from dsee_scale.pruning.refit.matrix import Job, settle
from dsee_scale.pruning.refit.output import TO_LOWER, meet_outputs_, tuned_outputs
from dsee_scale.pruning.refit.pieces import dealt, holders, owners_of, solve_pieces
from dsee_scale.pruning.refit.ready import ready_blocks
from dsee_scale.pruning.refit.units import note_refitted, unit_jobs, without_units
from dsee_scale.pruning.refit.work import block_pass, held, refitting_work
from dsee_scale.pruning.sensitivity_shares import find_shares
from dsee_scale.pruning.units import ChosenUnits, zero_units
from dsee_scale.pruning.zero_lines import check_reachable

BATCHES = "the tokens in each calibration batch"
"""Where memory ends while a block runs and nothing else is held."""


@torch.no_grad()
def refit(
    model: nn.Module,
    pools: Sequence[WeightPool],
    config: PruneConfig,
    batches: Batches,
    removed: Mapping[str, Tensor],
    partition: Partition,
    units: Sequence[ChosenUnits] = (),
    *,
    progress: bool | None = None,
) -> list[str]:
    """Collective. Prune the pools' weights and solve what stays.

    Peak extra memory per rank: one block's inputs; Gram matrices and the block's weights of up to
    `config.gram_memory_mib`, or one matrix's; what the rank solves of the block and then owns, in float32; one matrix
    more, and the solver's workspace for one; with `block_steps`, what it says; for scope `global`, see `prune`.

    Args:
        model: what `prune` was given.
        pools: the weights, each pool with its own sparsity.
        config: pattern and scope.
        batches: this rank's model inputs.
        removed: what `removed_inputs` found.
        partition: port to the weights.
        units: heads or neurons that go, where the pattern is one of these.
        progress: see `prune`.

    Returns:
        The matrices that too few tokens reached, pruned by |W + D| and not solved.

    Raises:
        CalibrationError: no batch or token, or activations that are not finite. Nothing was removed.
        TargetError: a quantised weight, or blocks that do not follow each other. Nothing was removed.
        PartitionError: out of memory; the message says which blocks are done.
    """
    module, blocks = unwrap(model), check_refit(model, pools, partition)
    begun, done, unsolved = list[str](), list[str](), list[str]()
    with evaluating(module):
        calls, jobs = _jobs(model, pools, blocks, batches, removed, units, config, partition, progress)
        bar = tqdm(blocks, desc="refit", unit="block", disable=not show_progress(progress))
        for index, (name, block) in enumerate(bar):
            here = [job for job in jobs if job.member.name.startswith(name + ".")]
            try:
                solved, owners, few = _solve_block(model, block, index, here, calls, config, partition)
                workspace = reserve(request_for(whole_pieces(here, owners)), config, partition)
                unsolved += few
                begun.append(name)  # from here on it may be written
                write_back(model, here, owners, solved, workspace, config, partition)
                zero_units(model, [each for each in units if each.layer.name == name], partition)
                done.append(name)
                del solved, workspace
                if index + 1 < len(blocks):
                    with block_pass(partition, config, BATCHES), held(block, len(calls), config, partition):
                        advance(block, index, calls, module, partition)
            except BaseException as error:
                raise _after(begun, done, module, error) from error
    note_refitted(module, [job.member for job in jobs])
    if not units:
        note_pattern(module, pools, config)
    return unsolved


def _first_inputs(
    model: nn.Module,
    members: Mapping[str, tuple[Matrix, float]],
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Batches,
    config: PruneConfig,
    partition: Partition,
) -> tuple[list[Call], dict[str, str], Statistics]:
    """Collective. The first block's inputs; by matrix the first one that reads the same; sums over linear inputs.

    Raises:
        CalibrationError: see `calibrate`.
    """
    where = torch.device("cpu") if config.inputs_on_cpu else compute_device(unwrap(model), partition)
    layers = {name: member.module for name, (member, _) in members.items() if member.expert is None}
    sums = InputSquares()
    with watching(layers, sums.take, again=sums.again) as watch:
        calls = capture(model, blocks, batches, partition, where, watch.batch)
    partition.raise_first(watch.problem)
    reject_uncounted([call.batch for call in calls if call.counts], partition)
    # Each block is run for itself, so layers of two blocks share nothing.
    of_block = {each: name.encode() for name, _ in blocks for each in layers if each.startswith(name + ".")}
    leaders = agreed_leaders({name: read + of_block[name] for name, read in watch.read.items()}, members)
    return calls, leaders, Statistics(*sums.reduce(layers, leaders, partition), fingerprint="")


def _jobs(
    model: nn.Module,
    pools: Sequence[WeightPool],
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Batches,
    removed: Mapping[str, Tensor],
    units: Sequence[ChosenUnits],
    config: PruneConfig,
    partition: Partition,
    progress: bool | None,
) -> tuple[list[Call], list[Job]]:
    """Collective. The first block's inputs, and what each matrix loses: its units, or its share by the loss or pool."""
    members = {member.name: (member, pool.sparsity) for pool in pools for member in pool.members}
    calls, leaders, statistics = _first_inputs(model, members, blocks, batches, config, partition)
    if units:
        return calls, unit_jobs(unwrap(model), units, leaders, config)
    shares = find_shares(
        model, pools, blocks, batches, leaders, statistics, removed, config, partition, progress=progress
    )
    return calls, [
        Job(
            member,
            shares.sparsity.get(name, sparsity),
            leaders[name],
            _left(removed.get(name)),
            shares.outputs.get(name),
            shares.tokens.get(leaders[name]),
            keeps_low_rank=config.mask_update,
        )
        for name, (member, sparsity) in members.items()
    ]


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """float32 as it is, by PyTorch's newer setting where there is one: after it, the older one fails.

    No TF32 on GPUs, and no bfloat16 on CPUs with AMX, both of which `set_float32_matmul_precision` may have allowed.
    """
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    settings: list[tuple[Any, str, Any]] = [(gpu, "fp32_precision", "ieee"), (cpu, "fp32_precision", "ieee")]
    if not hasattr(gpu, "fp32_precision"):
        settings[0] = (gpu, "allow_tf32", False)
    settings = [each for each in settings if hasattr(*each[:2])]
    before = [getattr(where, name) for where, name, _ in settings]
    for where, name, exact in settings:
        setattr(where, name, exact)
    try:
        yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)


@_exact()
def _solve_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    calls: Sequence[Call],
    config: PruneConfig,
    partition: Partition,
) -> tuple[dict[str, tuple[Tensor, Support | None]], dict[str, int], list[str]]:
    """Collective. Collect and solve one block's matrices: what this rank solved, all owners, those left unsolved."""
    module = unwrap(model)
    if config.block_steps:  # before anything of the block is written
        with block_pass(partition, config, TO_LOWER):
            tuned_outputs(block, index, calls, module, config, partition)
    pieces = dealt(jobs, partition.world_size)
    owners = owners_of(pieces)
    solved: dict[str, Tensor] = {}
    updates: dict[str, Delta] = {}
    unsolved: list[str] = []
    for group in grouped([job for job in jobs if job.is_solved], config.gram_memory_mib << 20):
        names = {job.member.name for job in group}
        here = [piece for piece in pieces if piece.job.member.name in names]
        needed = holders(here, partition.world_size)
        grams, few = collect_grams(module, block, index, group, calls, needed, config, partition)
        weights, deltas = own_weights(here, owners, config, partition)
        with torch.autocast(compute_device(module, partition).type, enabled=False):
            solved |= solve_pieces(here, grams, weights, owners, config, partition)
        unsolved += few
        updates |= deltas
        del grams
    if rest := whole_pieces([job for job in jobs if not job.is_solved], owners):
        weights, deltas = own_weights(rest, owners, config, partition)
        solved |= {rest[i].name: without_units(rest[i].job, weight) for i, weight in weights.items()}
        updates |= deltas
    if config.block_steps:
        meet_outputs_(model, block, index, jobs, solved, owners, calls, config, partition)
    with refitting_work(partition, config):
        settled = {
            job.member.name: settle(module, job, solved.pop(job.member.name), updates.get(job.member.name))
            for job in jobs
            if owners[job.member.name] == partition.rank
        }
    release_heap(module, partition)
    return settled, owners, unsolved


def _left(gone: Tensor | None) -> Tensor | None:
    return None if gone is None else (~gone).nonzero().flatten()


def check_refit(
    model: nn.Module, pools: Sequence[WeightPool], partition: Partition
) -> list[tuple[str, nn.Module]]:
    """The blocks, name and module, after refusing what no re-fit can do. Local, alike on all ranks.

    Raises:
        TargetError, PartitionError: see `ready_blocks` and `check_reachable`.
        ConfigError: within `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "a re-fit takes gradients of the loss, which torch.inference_mode rules out; call prune outside of it, or "
            "set refit=False. Nothing was removed"
        )
    blocks = ready_blocks(unwrap(model), pools, partition)
    members = [member for pool in pools for member in pool.members]
    check_reachable(model, list(adapter_params(members).values()))
    return blocks


def _after(
    begun: Sequence[str], done: Sequence[str], module: nn.Module, error: BaseException
) -> BaseException:
    """What to raise once the writing of these blocks has begun: the error itself while there are none."""
    if not begun:
        return error
    what = [f"{done[0]} to {done[-1]} are pruned and re-fitted"] if done else []
    if len(begun) > len(done):
        what.append(f"{begun[-1]} may be" if done else f"{begun[-1]} may be pruned and re-fitted")
    return stopped(module, error, f"{', '.join(what)}, later blocks are not")
