"""What the linear layers see: their inputs' size over calibration data, for scores that look at activations.

Batches are the user's own model inputs. Each rank brings its own (data parallel); positions that the attention mask
leaves out do not count. Layers that read the same tensors (q, k and v; gate and up) share one record.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.adapters.targets import find_modules, linear_kind, matches
from dsee_scale.distributed import raise_on_all_ranks, show_progress
from dsee_scale.errors import CalibrationError, FormatError
from dsee_scale.partition import Partition, open_partition, unwrap
from dsee_scale.passes.batches import (
    NO_TOKEN,
    Batches,
    evaluating,
    in_step,
    reject_encoder_decoder,
    reject_lone_batch,
    run_model,
    uncompiled,
)
from dsee_scale.passes.fingerprint import fingerprint
from dsee_scale.passes.inputs.masks import num_counted
from dsee_scale.passes.inputs.watch import InputSquares, agreed_leaders, watching
from dsee_scale.passes.pools import block_matrices
from dsee_scale.passes.routed import RoutedSums, is_sum

FORMAT_VERSION = 3
LEAST_TOKENS = 32
"""An expert that fewer tokens reached has no norms of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """How large each layer's inputs are, over all ranks' calibration tokens.

    Attributes:
        squares: module name -> (I,) float32, sum of the squares of each input.
        tokens: module name -> tokens that reached it.
        fingerprint: of the model and the adapter values that they were collected with.
        gated: module with experts -> for each expert the sum over its tokens of gate value times norm of its output.
    """

    squares: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    fingerprint: str
    gated: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def reached(self, name: str) -> bool:
        """Whether enough tokens reached a module, or an expert's matrix, for norms of its own."""
        of_expert = name.rsplit(".", 2)[0] in self.gated
        return self.tokens.get(name, 0) >= (LEAST_TOKENS if of_expert else 1)

    def norms(self, name: str) -> Tensor | None:
        """(I,) float32 root mean square of each input of a matrix, on the CPU; None if too few tokens reached it."""
        return (self.squares[name] / self.tokens[name]).sqrt_() if self.reached(name) else None

    def save(self, path: str | Path) -> None:
        """Write as one safetensors file, whose parents are made. Call it on one rank.

        Raises:
            FormatError: it can't be written, e.g. no space is left; what was there before stays.
        """
        path = Path(path)
        # Layers with one input share one tensor, here as in memory.
        first: dict[int, str] = {}
        stored = {name: first.setdefault(id(value), name) for name, value in self.squares.items()}
        header = {
            "format": "dsee_statistics",
            "version": str(FORMAT_VERSION),
            "tokens": json.dumps(self.tokens),
            "stored": json.dumps(stored),
            "fingerprint": self.fingerprint,
            "gated": json.dumps(dict(self.gated)),
        }
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: self.squares[name].contiguous() for name in first.values()}, partial, header)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise FormatError(f"the calibration statistics cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            FormatError: not such a file, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            squares = {name: tensors[at] for name, at in json.loads(header["stored"]).items()}
            tokens = {str(name): int(count) for name, count in json.loads(header["tokens"]).items()}
            version, found = header["version"], header["fingerprint"]
            gated = {name: [float(one) for one in sums] for name, sums in json.loads(header["gated"]).items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} holds no calibration statistics: {error}") from error
        if version != str(FORMAT_VERSION):
            raise FormatError(f"{path} has format version {version}; this dsee_scale reads {FORMAT_VERSION}")
        if squares.keys() != tokens.keys() or not all(
            value.dim() == 1
            and value.dtype == torch.float32
            and bool((value >= 0).all() & value.isfinite().all())
            for value in squares.values()
        ):
            raise FormatError(f"{path} is damaged: expected one non-negative float32 vector for each module")
        if not all(is_sum(one) for sums in gated.values() for one in sums):
            raise FormatError(f"{path} is damaged: expected non-negative sums for experts")
        return cls(squares, tokens, found, gated)


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Batches, *, modules: Sequence[str] = (), progress: bool | None = None
) -> Statistics:
    """Collective. Run batches through the model, adapters active, and sum the squares of each layer's inputs.

    Peak extra memory per rank: one float64 vector for each layer, and one layer's input in float32.

    Args:
        model: a raw model, whole or partitioned, or an engine.
        batches: model inputs: mappings of keyword arguments, tuples of positional ones, or tensors of token ids.
            Every rank brings its own, at least one.
        modules: further linear layers, by suffix or pattern; those of the blocks are always there.
        progress: show a progress bar on rank 0; None: only on a terminal.

    Returns:
        The statistics, the same on every rank.

    Raises:
        CalibrationError: a rank without batches, a batch that is no input of the model, no token that counts, a mask
            that does not say what of a layer's input is padding, or activations that are not finite; the same on every
            rank.
        TargetError: an encoder with a decoder.
    """
    model = getattr(model, "_orig_mod", model)
    module = unwrap(model)
    reject_encoder_decoder(module)
    partition = open_partition(module)
    with raise_on_all_ranks(partition, what="reading the calibration batches"):
        reject_lone_batch(batches)
    layers, experts = _layers(module, modules, partition)
    sums, counted = InputSquares(), 0
    with uncompiled(model), evaluating(module), watching(layers, sums.take, experts, sums.again) as watch:
        for batch, counts in tqdm(
            in_step(module, batches, partition),
            desc="calibrate",
            unit="batch",
            disable=not show_progress(progress),
        ):
            with watch.batch(batch, counts):
                run_model(model, batch, partition, short_logits=not modules)
            counted += num_counted(batch) if counts else 0
    partition.raise_first(watch.problem)
    if not partition.sum_over_ranks(torch.tensor([counted])).item():
        raise CalibrationError(NO_TOKEN)
    leaders = agreed_leaders(watch.read, layers)
    for each in experts.values():
        each.reduce(partition)
    squares, tokens = sums.reduce(layers, leaders, partition)
    for routed in experts.values():
        squares |= routed.squares()
        tokens |= routed.counts()
    gated = {name: routed.gated.tolist() for name, routed in experts.items()}
    return checked(Statistics(squares, tokens, fingerprint(module, partition), gated))


def _layers(
    module: nn.Module, further: Sequence[str], partition: Partition
) -> tuple[dict[str, nn.Module], dict[str, RoutedSums]]:
    """The linear layers and the modules with experts to watch, by name."""
    matrices = block_matrices(module, partition.shape)
    layers = {name: matrix.module for name, matrix in matrices.items() if matrix.expert is None}
    named = dict(module.named_modules())
    for pattern in further:
        if not any(
            matrix.expert is not None and matches(name, (pattern,)) for name, matrix in matrices.items()
        ):
            found = find_modules(module, (pattern,), what="calibrated module")
            layers |= {name: named[name] for name in found if linear_kind(named[name])}
    owners = dict.fromkeys(matrix.owner for matrix in matrices.values() if matrix.expert is not None)
    return layers, {name: RoutedSums(name, named[name], partition.shape) for name in owners}


def checked(statistics: Statistics) -> Statistics:
    """The statistics themselves. Local, alike on all ranks.

    Raises:
        CalibrationError: an input that is not finite, or no token.
    """
    broken = [name for name, value in statistics.squares.items() if not bool(value.isfinite().all())]
    if broken:
        raise CalibrationError(
            f"the inputs of {broken[0]} hold NaN or infinity (and those of {len(broken) - 1} more layers); check the "
            "calibration batches and the model's weights. Nothing was changed"
        )
    broken = [name for name, sums in statistics.gated.items() if not all(map(is_sum, sums))]
    if broken:
        raise CalibrationError(
            f"the outputs of the experts of {broken[0]} hold NaN or infinity (and those of {len(broken) - 1} more "
            "layers); check the calibration batches and the model's weights. Nothing was changed"
        )
    if not any(statistics.tokens.values()):
        raise CalibrationError(NO_TOKEN)
    return statistics
