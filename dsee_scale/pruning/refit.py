"""Prune and re-fit block after block: what stays is solved anew, so that each layer does what the tuned one did.

Per block: run it over the calibration data for the Gram matrices X^T X of its layers' inputs; sum each to the rank
that owns a matrix with that input; solve there, on W + D; scatter the new weights into the shards; run the block again
for the next one's inputs. So later blocks see what earlier ones do after pruning. D starts again at zero, on a support
among the entries that stay.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.linear import delta_record, is_adapted, restore_under_mask
from dsee_scale.adapters.matrices import Matrix
from dsee_scale.adapters.state import model_state, reject_broken
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.decompose import Support
from dsee_scale.algorithms.delta import AdapterSpec, delta_block
from dsee_scale.config import PruneConfig
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import CalibrationError, PartitionError, TargetError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.passes.batches import reject_encoder_decoder
from dsee_scale.passes.blocks import Call, advance, capture, find_blocks, run_block
from dsee_scale.passes.calibrate import (
    Batches,
    agreed_leaders,
    compute_device,
    evaluating,
    reject_uncounted,
    watching,
)
from dsee_scale.passes.deal import deal
from dsee_scale.passes.decompose_model import explain_shortage
from dsee_scale.passes.pools import WeightPool
from dsee_scale.passes.progress import show_progress
from dsee_scale.pruning.checks import note_pattern
from dsee_scale.pruning.refit_matrix import Job, solve
from dsee_scale.pruning.sensitivity_shares import find_shares
from dsee_scale.pruning.zero_lines import Lines, check_reachable, zero_lines

Counts = dict[str, tuple[int, int]]


@torch.no_grad()
def refit(
    model: nn.Module,
    pools: Sequence[WeightPool],
    config: PruneConfig,
    batches: Batches,
    removed: Mapping[str, Tensor],
    partition: Partition,
    *,
    progress: bool | None = None,
) -> Counts:
    """Collective. Prune the pools' weights and solve what stays; zeros and entries of each matrix.

    Peak extra memory per rank: the inputs of one block for this rank's batches; Gram matrices of up to
    `config.gram_memory_mib`, or of one matrix; the matrices of one block that the rank owns in float32, and the
    solver's workspace for one of them.

    Args:
        model: what `prune` was given.
        pools: the weights, each pool with its own sparsity.
        config: pattern and scope.
        batches: this rank's model inputs.
        removed: what `removed_inputs` found.
        partition: port to the weights.
        progress: see `prune`.

    Raises:
        CalibrationError: no batch or token, or activations that are not finite. Nothing was removed.
        TargetError: a quantised weight, or blocks that do not follow each other. Nothing was removed.
        PartitionError: out of memory; the message says which blocks are done.
    """
    module = unwrap(model)
    members = {member.name: (member, pool.sparsity) for pool in pools for member in pool.members}
    blocks = check_refit(model, pools, partition)
    done: list[str] = []
    hidden = not show_progress(partition, progress)
    with evaluating(module):
        layers = {name: member.module for name, (member, _) in members.items()}
        with watching(layers, lambda *_: None) as watch:
            where = torch.device("cpu") if config.inputs_on_cpu else compute_device(module, partition)
            calls = capture(model, blocks, batches, partition, where)
        reject_uncounted([call.batch for call in calls if call.counts], partition)
        leaders = agreed_leaders(watch.leaders, members)
        shares = find_shares(model, pools, blocks, batches, removed, config, partition, progress=progress)
        jobs = [
            Job(
                member,
                shares.sparsity.get(name, sparsity),
                leaders[name],
                _left(removed.get(name)),
                shares.outputs.get(name),
            )
            for name, (member, sparsity) in members.items()
        ]
        for index, (name, block) in enumerate(tqdm(blocks, desc="refit", unit="block", disable=hidden)):
            here = [job for job in jobs if job.member.name.startswith(name + ".")]
            try:
                with _exact():
                    solved, owners = _solve_block(model, block, index, here, calls, config, partition)
                workspace = _reserve(here, owners, config, partition)
                done.append(name)  # from here on it counts as written
                _write(model, here, owners, solved, workspace, partition)
                if index + 1 < len(blocks):
                    advance(block, index, calls, module, partition)
            except BaseException as error:
                raise _stopped(module, error, done) from error
    note_pattern(module, pools, config)
    restore_under_mask(module)
    return _counts([member for member, _ in members.values()], partition)


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """float32 as it is: no TF32, and none of the caller's autocast."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _solve_block(
    model: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    calls: Sequence[Call],
    config: PruneConfig,
    partition: Partition,
) -> tuple[dict[str, tuple[Tensor, Support | None]], dict[str, int]]:
    """Collective. Collect and solve the matrices of one block: what this rank solved, and the owner of each."""
    module = unwrap(model)
    owners = dict(
        zip(
            (job.member.name for job in jobs),
            deal([job.cost for job in jobs], partition.world_size),
            strict=True,
        )
    )
    solved: dict[str, tuple[Tensor, Support | None]] = {}
    for group in _groups(jobs, config.gram_memory_mib << 20):
        grams = _collect(module, block, index, group, calls, owners, config, partition)
        weights = _owned_weights(group, owners, config, partition)
        with _alike(partition, config), torch.autocast(compute_device(module, partition).type, enabled=False):
            for job in group:
                name = job.member.name
                if owners[name] == partition.rank:
                    solved[name] = solve(module, job, weights[name], grams[job.leader], config)
        del grams, weights
    return solved, owners


@contextlib.contextmanager
def _alike(partition: Partition, config: PruneConfig) -> Iterator[None]:
    """Collective at its end: an error of one rank's local work is every rank's; a shortage names what to lower."""
    with raise_on_all_ranks(partition):
        try:
            yield
        except Exception as error:
            setting = f"gram_memory_mib (now {config.gram_memory_mib})"
            raise explain_shortage(error, "while re-fitting a block", setting) from error


def _groups(jobs: Sequence[Job], max_bytes: int) -> Iterator[list[Job]]:
    """Matrices whose Gram matrices fit into the bound together; those with one input stay together."""
    by_leader: dict[str, list[Job]] = {}
    for job in jobs:
        by_leader.setdefault(job.leader, []).append(job)
    group: list[Job] = []
    used = 0
    for sharing in by_leader.values():
        if group and used + sharing[0].gram_bytes > max_bytes:
            yield group
            group, used = [], 0
        group += sharing
        used += sharing[0].gram_bytes
    if group:
        yield group


def _collect(
    module: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    calls: Sequence[Call],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. X^T X / tokens of the inputs of matrices that this rank owns, (I, I) float32, by leader.

    Raises:
        CalibrationError: an input is not finite.
    """
    leaders = {job.leader: job for job in jobs}
    device = compute_device(module, partition)
    with _alike(partition, config):  # a rank without the memory must not leave the others in a forward pass
        sums = {
            name: torch.zeros(job.member.num_inputs, job.member.num_inputs, device=device)
            for name, job in leaders.items()
        }
    tokens = dict.fromkeys(leaders, 0)
    short: list[Exception] = []

    def take(name: str, x_TI: Tensor) -> None:
        try:
            _add(sums[name], x_TI.float())
            tokens[name] += x_TI.shape[0]
        except (
            Exception
        ) as error:  # under ZeRO-3 the others wait for this forward pass: end it, then fail together
            short.append(error)

    watched = {name: module.get_submodule(name) for name in leaders}
    with watching(watched, take) as watch:
        for call in calls:
            with watch.batch(call.batch, call.counts):
                run_block(block, index, call, call.hidden, module, partition)
    with _alike(partition, config):
        if short:
            raise short[0]
    counts = partition.sum_over_ranks(torch.tensor(list(tokens.values()), dtype=torch.int64)).tolist()
    return _reduced(sums, dict(zip(leaders, counts, strict=True)), jobs, owners, config, partition)


def _add(gram_II: Tensor, x_TI: Tensor) -> None:
    gram_II.addmm_(x_TI.t(), x_TI)


def _reduced(
    sums: dict[str, Tensor],
    tokens: Mapping[str, int],
    jobs: Sequence[Job],
    owners: Mapping[str, int],
    config: PruneConfig,
    partition: Partition,
) -> dict[str, Tensor]:
    """Collective. Each Gram matrix summed to the ranks that own a matrix with that input."""
    grams = {}
    broken: Exception | None = None
    for name in list(sums):
        ranks = sorted({owners[job.member.name] for job in jobs if job.leader == name})
        with _alike(partition, config):  # a sum takes the place of what it adds up
            copies = [sums[name], *(sums[name].clone() for _ in ranks[1:])]
        del sums[name]
        for owner in ranks:
            total = partition.sum_to(copies.pop(), owner)
            if total is None:
                continue
            grams[name] = total.div_(max(1, tokens[name]))
            if not bool(grams[name].diagonal().isfinite().all()):
                broken = CalibrationError(
                    f"the inputs of {name} hold NaN or infinity; check the calibration batches and the model's weights"
                )
    partition.raise_together(broken)
    return grams


def _reserve(
    jobs: Sequence[Job], owners: Mapping[str, int], config: PruneConfig, partition: Partition
) -> Tensor:
    """Collective. What an exchange of these weights needs on this rank, before any rank waits for one that lacks it."""
    params, dealt = [job.member.param for job in jobs], [owners[job.member.name] for job in jobs]
    with _alike(partition, config):
        size = partition.exchange_bytes(params, dealt)
        return torch.empty(size, dtype=torch.uint8, device=partition.device)


def _owned_weights(
    jobs: Sequence[Job], owners: Mapping[str, int], config: PruneConfig, partition: Partition
) -> dict[str, Tensor]:
    """Collective. Whole W + D, (O, I) float32, of the matrices that this rank owns; zero wherever W is."""
    params = [job.member.param for job in jobs]
    dealt = [owners[job.member.name] for job in jobs]
    workspace = _reserve(jobs, owners, config, partition)
    whole = partition.start_exchange(params, dealt, workspace).wait()
    adapted = [job.member for job in jobs if is_adapted(job.member.module)]
    flats = partition.gather([member.module.dsee_flat for member in adapted]) if adapted else []  # type: ignore[misc]
    by_name = dict(zip((member.name for member in adapted), flats, strict=True))
    with _alike(partition, config):
        return _effective(jobs, whole, by_name)


def _effective(
    jobs: Sequence[Job], whole: Mapping[int, Tensor], flats: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Local. W + D, (O, I) float32, of owned matrices, given the adapters' values by module name."""
    found = {}
    for index, stored in whole.items():
        member = jobs[index].member
        weight = stored.float()
        if member.name in flats:
            delta = delta_record(member.module, flats[member.name])
            weight = weight + delta_block(delta, 0, member.shape[0]).to(weight.device)
            # What an earlier pruning removed is gone, whatever D says there.
            weight.masked_fill_(stored == 0, 0)
        found[member.name] = weight.t().contiguous() if member.transposed else weight.clone()
    return found


def _write(
    model: nn.Module,
    jobs: Sequence[Job],
    owners: Mapping[str, int],
    solved: Mapping[str, tuple[Tensor, Support | None]],
    workspace: Tensor,
    partition: Partition,
) -> None:
    """Collective. New weights into the shards, new supports to all ranks, D = 0."""
    values = {at: solved[job.member.name][0] for at, job in enumerate(jobs) if job.member.name in solved}
    params, dealt = [job.member.param for job in jobs], [owners[job.member.name] for job in jobs]
    partition.scatter(params, dealt, values, workspace)
    lines = []
    for job in jobs:
        layer = job.member.module
        if not is_adapted(layer):
            continue
        spec: AdapterSpec = layer.dsee_spec  # type: ignore[assignment]
        if spec.num_sparse:
            support = solved[job.member.name][1] if job.member.name in solved else None
            _share_support(layer, support, owners[job.member.name], partition)
        a, b, v = (math.prod(shape) for shape in spec.shapes)
        gone = torch.ones(b + v, dtype=torch.bool)
        lines.append(Lines(layer.dsee_flat, 1, gone, (1, b + v), a))  # type: ignore[arg-type]
    zero_lines(model, partition, lines)


def _share_support(layer: nn.Module, support: Support | None, owner: int, partition: Partition) -> None:
    rows, cols = layer.dsee_rows, layer.dsee_cols
    if support is None:
        packed = torch.empty(2, rows.numel(), dtype=torch.int32, device=partition.device)  # type: ignore[operator]
    else:
        packed = torch.stack([support.rows, support.cols]).to(partition.device)
    partition.broadcast(packed, owner)
    rows.copy_(packed[0])  # type: ignore[operator]
    cols.copy_(packed[1])  # type: ignore[operator]
    layer.dsee_prepare()  # type: ignore[operator]


def _left(gone: Tensor | None) -> Tensor | None:
    return None if gone is None else (~gone).nonzero().flatten()


def _counts(members: Sequence[Matrix], partition: Partition) -> Counts:
    """Collective. Zeros and entries of each matrix."""
    shards = [member.shard(partition).data for member in members]
    zeros = partition.sum_over_shards(
        torch.tensor([shard.numel() - count_nonzero(shard) for shard in shards])
    )
    return {member.name: (count, member.numel) for member, count in zip(members, zeros.tolist(), strict=True)}


def check_refit(
    model: nn.Module, pools: Sequence[WeightPool], partition: Partition
) -> list[tuple[str, nn.Module]]:
    """The blocks, name and module, after refusing what no re-fit can do. Local, alike on all ranks.

    Raises:
        TargetError: quantised weights, several devices, or weights outside of one list of blocks.
        PartitionError: see `check_reachable`.
    """
    members = {member.name: member for pool in pools for member in pool.members}
    for name, member in members.items():
        if member.expert is not None:
            raise TargetError(
                f"{name} is an expert's, and a re-fit does not reach experts; set refit=False to prune them by wanda "
                "alone, or leave them out with `modules`. Nothing was removed"
            )
        if id(member.param) in partition.codecs:
            raise TargetError(
                f"{name}.weight is quantised, and re-fitted values would have to be rounded to its codes again; set "
                "refit=False to prune by wanda alone, or load the base unquantised. Nothing was removed"
            )
    devices = {partition.compute_device(member.param) for member in members.values()}
    if len(devices) > 1:
        raise TargetError(
            f"the weights lie on several devices ({', '.join(sorted(map(str, devices)))}), and a re-fit runs all "
            "on one; load it without a device_map, or set refit=False. Nothing was removed"
        )
    adapted = [member.module.dsee_flat for member in members.values() if is_adapted(member.module)]
    check_reachable(model, adapted)  # type: ignore[arg-type]
    reject_encoder_decoder(unwrap(model))
    return find_blocks(unwrap(model), list(members))


def _stopped(module: nn.Module, error: BaseException, done: Sequence[str]) -> BaseException:
    """The error itself while nothing is written; else one that says what is, after which nothing goes on."""
    if not done:
        return error
    message = (
        f"pruning stopped half way: {done[0]} to {done[-1]} are pruned and re-fitted, later blocks are not "
        f"({error or type(error).__name__}). "
        "Load the model or the last checkpoint again"
    )
    model_state(module).broken = message
    module.register_forward_pre_hook(lambda *_: reject_broken(module))
    return PartitionError(message)
