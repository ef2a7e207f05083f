"""How much the loss depends on each output of each layer, and on each token there: squared gradients.

One forward and one backward pass of each batch through the frozen model. No parameter gets a gradient: the graph
begins at the first block's input. Blocks that are trained with activation checkpointing are run with it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dsee_scale.distributed import gather_objects, show_progress
from dsee_scale.errors import CalibrationError
from dsee_scale.partition import Partition, unwrap
from dsee_scale.partition.engine_state import no_leaf_gradients
from dsee_scale.passes.batches import (
    compute_device,
    evaluating,
    in_step,
    no_cache,
    to_device,
    together,
)
from dsee_scale.passes.inputs.masks import fitting, token_mask
from dsee_scale.passes.label_logits import IGNORED, label_loss, logits_at, output_layer, predicting


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """Squared gradients of the loss in the outputs of linear layers.

    Attributes:
        outputs: module name -> (O,) float32, each output's mean over tokens, the same on every rank.
        tokens: module name -> for each of this rank's batches that count, (T,) float32 on the CPU: each token's sum
            over outputs, as a multiple of the mean over all ranks' tokens. Without layers that a batch misses or runs
            through twice, or that see some of its tokens alone, as an expert does.
    """

    outputs: dict[str, Tensor]
    tokens: dict[str, list[Tensor]]


def has_loss(model: nn.Module, batches: Sequence[Any], partition: Partition) -> bool:
    """Collective. Whether every rank's batches give a loss: labels, or token ids of a decoder, and some that count.

    Raises:
        CalibrationError: labels that don't fit the inputs or the model, which one rank alone would stumble over.
    """
    module = unwrap(model)
    labelled = [_with_labels(module, batch) for batch in batches]
    wrong = [problem for each in labelled if each is not None and (problem := _label_problem(module, each))]
    partition.raise_first(
        CalibrationError(f"the labels of a calibration batch {wrong[0]}. Nothing was changed")
        if wrong
        else None
    )
    counted = any(_counts_labels(module, each["labels"]) for each in labelled if each is not None)
    found = gather_objects((None not in labelled, counted))
    return all(given for given, _ in found) and any(some for _, some in found)


def output_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Any],
    partition: Partition,
    *,
    progress: bool | None = None,
) -> Sensitivity:
    """Collective. Squared gradients of the loss in the outputs of the layers.

    The loss is summed over its labels, so that batches count by what they hold. Peak extra memory per rank: the
    activations of one batch, as in a training step; on the CPU, four bytes for each token and layer.

    Args:
        model: what `prune` was given.
        layers: linear layers inside the blocks, by name.
        widths: their number of outputs.
        blocks: name and module of the repeated blocks, in order.
        batches: this rank's model inputs, of which `has_loss` is true.
        partition: port to the weights.
        progress: see `prune`.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    module = unwrap(model)
    sums = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}
    by_token: dict[str, list[Tensor]] = {name: [] for name in widths}
    tokens = 0
    device = compute_device(module, partition)
    with (
        evaluating(module),
        frozen(module),
        no_leaf_gradients(model),
        graph_from(blocks[0][1]),
        _checkpointing([block for _, block in blocks]),
        _watching(layers, sums, blocks[0][1]) as watch,
    ):
        quiet = not show_progress(progress)
        steps = in_step(module, batches, partition)
        for batch, counts in tqdm(steps, desc="sensitivity", unit="batch", disable=quiet):
            labelled = _with_labels(module, batch)
            assert labelled is not None, "has_loss has seen it"
            watch.begin(token_mask(labelled) if counts else None, counts)
            with torch.enable_grad(), together(partition):
                _loss(module, to_device(labelled, device)).backward()
            if counts:
                tokens += watch.seen
                by_token = {n: [*each, watch.once[n]] for n, each in by_token.items() if n in watch.once}
    means = _means(sums, tokens, partition)
    totals = {name: float(means[name].sum()) for name in by_token}
    relative = {n: [each / totals[n] for each in by_token[n]] for n in by_token if totals[n] > 0}
    return Sensitivity(means, relative)


def _means(sums: Mapping[str, Tensor], tokens: int, partition: Partition) -> dict[str, Tensor]:
    """Collective. Sums over all ranks' tokens, divided by how many these are."""
    packed = torch.cat([*sums.values(), torch.tensor([tokens], dtype=torch.float64)])
    total = partition.sum_over_ranks(packed)
    if not bool(total.isfinite().all()):
        raise CalibrationError(
            "the loss's gradients on the calibration batches hold NaN or infinity; check the batches and the model's "
            "weights. Nothing was changed"
        )
    found = total[:-1].div_(total[-1].clamp_(min=1)).float().split([len(each) for each in sums.values()])
    return dict(zip(sums, found, strict=True))


def _with_labels(module: nn.Module, batch: Any) -> dict[str, Any] | None:
    """The batch as keyword arguments that give a loss, None if it can't; a decoder predicts its own tokens."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        return None
    inputs = dict(batch)
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if not isinstance(labels, Tensor):
        if not isinstance(ids, Tensor) or not _is_decoder(module):
            return None
        labels = _own_labels(ids, inputs.get("position_ids"))
    inputs["labels"] = _without_padding(module, labels, token_mask(batch))
    return inputs


def _own_labels(ids: Tensor, positions: Any) -> Tensor:
    """The tokens themselves, but none that begins a document: what comes before it in the row is another one."""
    if not isinstance(positions, Tensor) or positions.dim() > 2 or positions.shape[-1:] != ids.shape[-1:]:
        return ids
    return ids.masked_fill((positions == 0).to(ids.device), IGNORED)


def _without_padding(module: nn.Module, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels of tokens that count, of a decoder also predicted from one: padding on the left may see real tokens."""
    if mask is None or mask.shape != labels.shape or labels.is_floating_point():
        return labels
    # Nothing predicts the first token, whatever its label.
    counted = mask & mask.roll(1, dims=1) if _is_decoder(module) else mask
    return labels.masked_fill(~counted.to(labels.device), IGNORED)


def _label_problem(module: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    labels, ids, config = inputs["labels"], inputs.get("input_ids"), getattr(module, "config", None)
    classes = getattr(config, "num_labels", None)
    if isinstance(ids, Tensor):
        shapes = [tuple(ids.shape), (len(ids),)]
        if labels.is_floating_point() and isinstance(classes, int):
            shapes.append((len(ids), classes))
        if tuple(labels.shape) not in shapes:
            return f"have the shape {tuple(labels.shape)}; expected {' or '.join(map(str, shapes))}"
    if labels.is_floating_point():
        return None
    classifies = labels.dim() == 1 or (output_layer(module) is None and hasattr(module, "num_labels"))
    name = "num_labels" if classifies else "vocab_size"
    bound = getattr(config, name, None)
    if not isinstance(bound, int) or (labels.dim() == 2 and not isinstance(ids, Tensor)):
        return None
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < bound:
        return f"go from {int(counted.min())} to {int(counted.max())}; expected 0 to {bound - 1} ({name}), or {IGNORED}"
    return None


def _counts_labels(module: nn.Module, labels: Tensor) -> bool:
    """Whether any label is one to be predicted; without, all gradients would be zero."""
    shifted = labels.dim() == 2 and _is_decoder(module)
    return bool((predicting(labels) if shifted else labels != IGNORED).any())


def _is_decoder(module: nn.Module) -> bool:
    return output_layer(module) is not None and hasattr(module, "generate")


def _loss(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's loss, summed over labels; a decoder's from no more logits than it needs."""
    labels, inputs = inputs["labels"], {**inputs, **no_cache(module)}
    if labels.dim() == 2 and _is_decoder(module):
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        with logits_at(module, predicting(labels)):
            return label_loss(_found(module(**rest), "logits"), labels, num_items=1)
    return _found(module(**inputs), "loss").float() * int((labels != IGNORED).sum())


def _found(output: Any, name: str) -> Tensor:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if not isinstance(value, Tensor):
        raise CalibrationError(
            f"the model returns no {name} for its labels, which scope 'global' of a re-fit needs; set scope='matrix'. "
            "Nothing was changed"
        )
    return value


class _Watch:
    """What the hooks know about the batch that runs.

    Attributes:
        mask: (B, T) tokens that count, None for all.
        counts: whether this batch counts on this rank.
        total: B * T.
        once: module name -> (T,), the squared gradients in all outputs of each token that counts, of layers that ran
            once and on all tokens. Which ones an expert sees changes as earlier layers are pruned.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.counts = True
        self.total = 0
        self.once: dict[str, Tensor] = {}
        self.other: set[str] = set()

    def begin(self, mask: Tensor | None, counts: bool) -> None:
        """The next batch."""
        self.mask, self.counts, self.once, self.other = mask, counts, {}, set()

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the first block."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.total = hidden.shape[:-1].numel()

    @property
    def seen(self) -> int:
        """Tokens of this batch that count."""
        return self.total if self.mask is None or self.mask.numel() != self.total else int(self.mask.sum())

    def add(self, name: str, token_squares: Tensor, *, all_tokens: bool) -> None:
        """One run of a layer."""
        if name in self.once or not all_tokens:
            self.other.add(name)
            self.once.pop(name, None)
        elif name not in self.other:
            self.once[name] = token_squares.cpu()


@contextlib.contextmanager
def _watching(
    layers: Mapping[str, nn.Module], sums: Mapping[str, Tensor], first: nn.Module
) -> Iterator[_Watch]:
    """Hooks that add up each output's squared gradients."""
    watch = _Watch()

    def take(name: str, gradient: Tensor) -> None:
        if not watch.counts:
            return
        all_tokens = gradient.shape[:-1].numel() == watch.total
        kept = None if watch.mask is None else fitting(watch.mask, gradient.shape[:-1])
        counted = gradient if kept is None else gradient[kept.to(gradient.device)]
        squares = counted.reshape(-1, gradient.shape[-1]).float().square()
        sums[name].add_(squares.sum(0, dtype=torch.float64).cpu())
        watch.add(name, squares.sum(1), all_tokens=all_tokens)

    def hook(name: str) -> Callable[..., None]:
        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: take(name, gradient))

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    handles.append(first.register_forward_pre_hook(watch.enter, with_kwargs=True))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """What is checkpointed in training is checkpointed here: the block alone trains, without the dropout it may call.

    Its rate is a number of the block or of its config.
    """
    own = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]
    holders = {id(each): each for block in own for each in (block, getattr(block, "config", None))}
    rates = [
        (each, name, rate)
        for each in holders.values()
        for name, rate in getattr(each, "__dict__", {}).items()
        if "drop" in name and isinstance(rate, float)
    ]
    try:
        for each, name, _ in rates:
            setattr(each, name, 0.0)
        for block in own:
            block.training = True
        yield
    finally:
        for block in own:
            block.training = False
        for each, name, rate in rates:
            setattr(each, name, rate)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: nothing is added to those of the user's optimizer."""
    trained = [param for param in module.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)


@contextlib.contextmanager
def graph_from(block: nn.Module) -> Iterator[None]:
    """A block's input is where the graph begins."""

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    handle = block.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
