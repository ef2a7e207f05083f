"""The second stage of a re-fit: a block's kept weights take a few steps of Adam towards what the tuned block gives.

The sweep solves each matrix for itself, on inputs that earlier prunings have changed. Here all linear layers of a block
move together, so that its output meets the tuned model's at that place (as in EBFT, Guo et al., arXiv 2402.12419).
Every rank has the block's linear layers whole for the time, in float32 with Adam's moments, and each step takes one
batch from every rank. In float16 a step whose gradients overflow is taken again with a smaller error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.matrices import Matrix
from dsee_scale.algorithms.score import all_finite
from dsee_scale.config import PruneConfig
from dsee_scale.partition import Partition, unwrap
from dsee_scale.partition.engine_state import no_leaf_gradients
from dsee_scale.passes.blocks import Call, run_block
from dsee_scale.passes.inputs.masks import token_mask
from dsee_scale.passes.sensitivity import frozen, graph_from
from dsee_scale.pruning.refit.matrix import Job
from dsee_scale.pruning.refit.work import held, refitting_work

RATE = 0.01
"""Highest learning rate, as a multiple of the root mean square of a matrix's kept weights."""
WARMUP = 5
"""Steps until it is reached; then it falls to zero linearly."""
BETAS = (0.9, 0.99)
EPSILON = 1e-16
"""Small enough that the scale of gradients makes no difference."""
LEAST_FACTOR = 2.0**-24
"""How far the error is scaled down for float16's gradients before a step is left out."""
TO_LOWER = "block_steps to 0"
"""Where memory ends here."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer while its weight is trained.

    Attributes:
        module: the layer.
        weight: V, (O, I) float32.
        kept: bool (O, I), where it was not pruned.
    """

    module: nn.Module
    weight: Tensor
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """In place of its own: x V^T + bias."""
        bias: Any = self.module.bias
        return nn.functional.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def rms(self) -> float:
        """Root mean square of what was kept."""
        return float((self.weight.detach().square().sum() / self.kept.sum().clamp(min=1)).sqrt())

    def sum_gradient_(self, factor: float, partition: Partition) -> bool:
        """Collective. The gradient of all ranks' tokens; none for what was pruned, which Adam then leaves at zero.

        Returns whether it is finite, alike on all ranks. `factor` is what the error was multiplied by.
        """
        found = self.weight.grad
        if found is None:  # no token of this rank went through
            found = torch.zeros_like(self.weight)
        self.weight.grad = partition.sum_over_ranks(found).mul_(self.kept).div_(factor)
        return all_finite(self.weight.grad)

    def whole(self) -> Tensor:
        """V, zero where it was pruned and nowhere else."""
        weight = self.weight.detach()
        return weight.masked_fill_((weight == 0) & self.kept, torch.finfo(weight.dtype).tiny)


def tuned_outputs(
    block: nn.Module,
    index: int,
    calls: Sequence[Call],
    module: nn.Module,
    config: PruneConfig,
    partition: Partition,
) -> None:
    """Collective, before the block is pruned. Each call's `tuned` becomes what the tuned block gives for it."""
    with held(block, len(calls), config, partition):
        for call in calls:
            before = call.hidden if call.tuned is None else call.tuned
            call.tuned = run_block(block, index, call, before, module, partition).to(call.hidden.device)


def meet_outputs_(
    model: nn.Module,
    block: nn.Module,
    index: int,
    jobs: Sequence[Job],
    weights: dict[str, Tensor],
    owners: Mapping[str, int],
    calls: Sequence[Call],
    config: PruneConfig,
    partition: Partition,
) -> None:
    """Collective. Train what the sweep left of a block's linear layers; experts' matrices stay as they are.

    Args:
        model: what `prune` was given.
        block: the block.
        index: its number.
        jobs: its matrices.
        weights: by name, W + D after the sweep of those that this rank owns, (O, I) float32; changed in place.
        owners: rank that owns each.
        calls: this rank's batches, with inputs and the tuned block's outputs.
        config: `block_steps`.
        partition: port to the weights.
    """
    module = unwrap(model)
    layers = _whole_layers(
        [job.member for job in jobs if job.member.expert is None], weights, owners, partition, config
    )
    if not layers:
        return
    with torch.enable_grad(), refitting_work(partition, config, TO_LOWER):
        groups = [{"params": [each.weight], "lr": RATE * each.rms()} for each in layers.values()]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _factor(step, config.block_steps)
        )
    with (
        torch.enable_grad(),
        frozen(module),
        no_leaf_gradients(model),
        graph_from(block),
        _trained(layers),
        held(block, config.block_steps, config, partition),
    ):
        factor, failed = 1.0, list[Exception]()
        for number in _order(len(calls), config.block_steps, seed=index):
            error = functools.partial(_error, block, index, calls[number], module, partition)
            factor = _find_gradients(layers.values(), error, factor, partition, failed) or factor
            with refitting_work(partition, config, TO_LOWER):
                if failed:
                    raise failed[0]
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    weights |= {name: each.whole() for name, each in layers.items() if owners[name] == partition.rank}


def _find_gradients(
    layers: Collection[_Layer],
    error: Callable[[], Tensor],
    factor: float,
    partition: Partition,
    failed: list[Exception],
) -> float:
    """Collective. The layers' gradients of the error; no gradient where they are not finite, however it is scaled.

    What goes wrong on this rank alone is put into `failed`, for all ranks to fail together later.

    Returns the factor that took it into float16's range, at most the given one, alike on all ranks; 0 for none.
    """
    while factor >= LEAST_FACTOR:
        try:
            (error() * factor).backward()
        except Exception as problem:
            if not partition.replicated:  # the others wait within this pass
                raise
            failed.append(problem)
            for layer in layers:
                layer.weight.grad = None
        if all([layer.sum_gradient_(factor, partition) for layer in layers]):
            return factor
        for layer in layers:
            layer.weight.grad = None
        factor /= 2
    return 0.0


def _whole_layers(
    members: Sequence[Matrix],
    weights: Mapping[str, Tensor],
    owners: Mapping[str, int],
    partition: Partition,
    config: PruneConfig,
) -> dict[str, _Layer]:
    """Collective. The layers with their owners' weights on every rank."""
    whole = {}
    with refitting_work(partition, config, TO_LOWER):  # before any rank waits for one that lacks the memory
        for member in members:
            weight = weights.get(member.name)
            if weight is None:
                weight = torch.empty(member.outputs_by_inputs, device=partition.compute_device(member.param))
            whole[member.name] = weight
    for name, weight in whole.items():
        partition.broadcast(weight, owners[name])
    with refitting_work(partition, config, TO_LOWER):
        kept = {name: weight != 0 for name, weight in whole.items()}
    return {
        member.name: _Layer(member.module, whole[member.name].requires_grad_(), kept[member.name])
        for member in members
    }


def _factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * (1 - step / steps)


def _order(num_calls: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all in turn, shuffled anew each time, alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(num_calls, generator=generator).tolist()
    return found[:steps]


def _error(block: nn.Module, index: int, call: Call, module: nn.Module, partition: Partition) -> Tensor:
    """Squared error, summed over what counts: Adam needs no scale, and a mean's gradients could vanish in float16."""
    found = run_block(block, index, call, call.hidden, module, partition)
    assert call.tuned is not None
    squares = (found.float() - call.tuned.to(found.device).float()).square()
    if (mask := token_mask(call.batch)) is not None and mask.shape == squares.shape[:2]:
        squares = squares[mask.to(squares.device)]
    return squares.sum() * float(call.counts)


@contextlib.contextmanager
def _trained(layers: Mapping[str, _Layer]) -> Iterator[None]:
    """The layers compute with the weights that are trained.

    A forward that somebody else gave a layer, such as accelerate's, would call the layer's own with the weight that
    isn't trained; so it's left out, and is there again afterwards.
    """
    before = [(layer.module, vars(layer.module).get("forward")) for layer in layers.values()]
    for layer in layers.values():
        layer.module.forward = layer.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
