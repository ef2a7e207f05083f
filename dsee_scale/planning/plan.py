"""How much memory, traffic, disk and time a run needs, from a model's sizes alone, and what to choose.

The training step is DeepSpeed ZeRO-3's with the settings of `ds_configs/zero3_bf16.json`. `benchmarks/memory.py`
prints these figures beside what a step really allocates, and a test compares them. Bytes throughout.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from dsee_scale.adapters.kernels.factors import MOST_ENTRIES
from dsee_scale.errors import ConfigError
from dsee_scale.planning.shapes import ModelShape

Quantize = Literal["nf4", "fp4", "int8"]
GIB = 2**30
REDUCE_BUCKET = 20_000_000
"""Elements of the buffer in which gradients are gathered (`reduce_bucket_size`)."""
PREFETCH_BUCKET = 50_000_000
REUSE_DISTANCE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a weight that it needs again (`stage3_max_reuse_distance`)."""
PERSISTENT = 1_000_000
"""Elements below which a parameter stays whole on every GPU (`stage3_param_persistence_threshold`)."""
DECOMPOSED_PER_SECOND = 22e6
"""Entries that one CPU core decomposes in a second: 14336 x 4096 in 2.6 s (docs/decomposition.md)."""
CHUNKS = 256 * 2**20
"""Bytes of the chunks that a pruning's search goes by, on a GPU: their bits, digits and scores."""
RESERVED = 0.08
"""Share of a GPU's memory left to the CUDA context, workspaces and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is planned.

    Attributes:
        gpus: processes.
        quantize: format of the base's linear layers; None for bfloat16.
        offload: parameters and optimizer on the host.
        rank, num_sparse, targets: the adapters.
        batch: sequences per GPU.
        length: tokens per sequence.
        checkpointing: activation checkpointing.
        labels: share of tokens that have a label; only these reach the output layer. 1 for all.
    """

    gpus: int
    quantize: Quantize | None = None
    offload: bool = False
    rank: int = 16
    num_sparse: int = 64
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 1
    length: int = 2048
    checkpointing: bool = True
    labels: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens on a GPU in one step."""
        return self.batch * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU and, for each GPU, on its host."""

    gpu: float
    host: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Everything that `dsee-scale plan` prints.

    Attributes:
        phases: peak memory of each phase.
        traffic: bytes that each GPU receives in one training step.
        checkpoint: bytes of a checkpoint.
        export: bytes of the exported model.
        decomposition: seconds on one CPU core for each process.
        trainable: entries that are trained.
    """

    shape: ModelShape
    setting: Setting
    phases: dict[str, Memory]
    traffic: float
    checkpoint: float
    export: float
    decomposition: float
    trainable: int

    @property
    def peak(self) -> Memory:
        """The largest of all phases."""
        return Memory(max(m.gpu for m in self.phases.values()), max(m.host for m in self.phases.values()))


def bytes_per_entry(quantize: Quantize | None) -> float:
    """Bytes of one entry's code."""
    return {None: 2.0, "int8": 1.0, "nf4": 0.5, "fp4": 0.5}[quantize]


def make_plan(shape: ModelShape, setting: Setting) -> Plan:
    """All figures for one setting.

    Raises:
        ConfigError: the setting names no layer of the model.
    """
    trainable = adapter_entries(shape, setting)
    masks = (shape.block_entries + shape.expert_entries) / 8
    return Plan(
        shape=shape,
        setting=setting,
        phases={
            "load": load_memory(shape, setting),
            "decompose": decompose_memory(shape, setting),
            "train": training_memory(shape, setting),
            "prune": prune_memory(shape, setting),
            "retune": training_memory(shape, setting, masked=True),
            "export": export_memory(shape, setting),
        },
        traffic=_traffic(shape, setting),
        # Master values and two moments in float32; the adapters themselves; a bit for each prunable entry.
        checkpoint=trainable * 14 + masks,
        export=2.0 * shape.parameters,
        decomposition=_decomposed_entries(shape, setting) / DECOMPOSED_PER_SECOND / setting.gpus,
        trainable=trainable,
    )


def adapter_entries(shape: ModelShape, setting: Setting) -> int:
    """Entries of A, B and S2 over all targets.

    Raises:
        ConfigError: a target is not a layer of the model.
    """
    known = (*shape.matrices, *shape.experts, *(["experts"] if shape.experts else []))
    unknown = [name for name in setting.targets if name not in known]
    if unknown:
        raise ConfigError(
            f"target {unknown[0]!r} is not a layer of {shape.name}; its layers: {', '.join(known)}"
        )
    return sum(setting.rank * (o + i) + setting.num_sparse for o, i in _targets(shape, setting))


def _targets(shape: ModelShape, setting: Setting) -> list[tuple[int, int]]:
    """(outputs, inputs) of every adapted matrix."""
    return [one for name in dict.fromkeys(setting.targets) for one in shape.target(name)]


def travelling_entries(shape: ModelShape, setting: Setting) -> int:
    """Of these, the ones of experts where a layer's, one parameter, are too many to stay whole on every GPU."""
    found = 0
    for sizes in _adapted_experts(shape, setting):
        entries = [setting.rank * (o + i) + setting.num_sparse for o, i in sizes]
        if entries[0] * shape.experts_of_a_layer >= PERSISTENT:
            found += sum(entries)
    return found


def _adapted_experts(shape: ModelShape, setting: Setting) -> list[tuple[tuple[int, int], ...]]:
    """(outputs, inputs) of each expert's matrix, for every adapted kind of them."""
    names = tuple(shape.experts) if "experts" in setting.targets else setting.targets
    return [shape.experts[name] for name in dict.fromkeys(names) if name in shape.experts]


def training_memory(shape: ModelShape, setting: Setting, *, masked: bool = False) -> Memory:
    """The peak of one training step; `masked` where the update is trained under the mask of a pruned weight."""
    trainable = adapter_entries(shape, setting)
    share = trainable / setting.gpus
    base = _stored_base(shape, setting) / setting.gpus
    # Float32 master values, two moments, the gradient of the step; gradients kept in float32.
    optimizer = share * (4 + 4 + 4 + 4 + 4)
    # Adapters count as whole on every GPU; their shards, too; their gradients when backward is done. Of large ones of
    # experts the shards alone: they come and go with the experts.
    whole = trainable - travelling_entries(shape, setting)
    resident = whole * 2 + share * 2 + whole * 2
    gpu = resident + _scales(shape, setting) + REDUCE_BUCKET * 4
    gpu += _live_weights(shape, setting) + _decoded(shape, setting)
    if masked:  # the merged weight, then in its place the gradient of D; of experts a layer's together
        gpu += 2.0 * max(largest_target(shape, setting), _adapted_layer(shape, setting))
    else:
        gpu += kept_factors(shape, setting)
    factors = 0.0 if masked else _expert_factors(shape, setting)
    forward = _forward_activations(shape, setting) + _gathered(shape, setting) + factors
    gpu += max(forward, _activations(shape, setting) + 2 * factors)  # in backward with their gradient
    if setting.offload:
        return Memory(gpu, base + optimizer)
    return Memory(gpu + base + optimizer)


def load_memory(shape: ModelShape, setting: Setting) -> Memory:
    """bfloat16 is partitioned while it loads; transformers loads a quantised base whole on every GPU."""
    stored, one = _stored_base(shape, setting), 2.0 * max(shape.largest, shape.vocab * shape.hidden)
    if setting.quantize is not None:
        return Memory(stored + _scales(shape, setting) + 2.0 * shape.largest)
    if setting.offload:
        return Memory(one, stored / setting.gpus + one)
    return Memory(stored / setting.gpus + one, one)


def decompose_memory(shape: ModelShape, setting: Setting) -> Memory:
    """The base, what two rounds of 64 MiB (or a matrix) send and receive, and one matrix's workspace in float32."""
    stored = _stored_base(shape, setting)
    largest = largest_target(shape, setting)
    travels = 4 * max(64 * 2**20, largest * bytes_per_entry(setting.quantize))
    work = 4 * 4.0 * largest
    if setting.quantize is not None:  # not partitioned before the engine is made
        return Memory(stored + _scales(shape, setting) + work)
    base = stored / setting.gpus
    return Memory(travels + work, base) if setting.offload else Memory(base + travels + work)


def prune_memory(shape: ModelShape, setting: Setting) -> Memory:
    """The training state, adapters in float32, and a shard of one weight decoded."""
    trainable = adapter_entries(shape, setting)
    base = _stored_base(shape, setting) / setting.gpus
    optimizer = trainable / setting.gpus * 20
    extra = trainable * (2 + 4) + _scales(shape, setting) + CHUNKS
    if setting.quantize is not None:
        extra += 2.0 * shape.largest / setting.gpus
    return Memory(extra, base + optimizer) if setting.offload else Memory(base + optimizer + extra)


def export_memory(shape: ModelShape, setting: Setting) -> Memory:
    """On rank 0: the training state and one weight whole, decoded."""
    prune = prune_memory(shape, setting)
    one = max(shape.largest, shape.vocab * shape.hidden) * 2.0
    return dataclasses.replace(prune, gpu=prune.gpu + one, host=prune.host + one)


def largest_target(shape: ModelShape, setting: Setting) -> int:
    """Entries of the largest adapted matrix."""
    return max(math.prod(one) for one in _targets(shape, setting))


def _adapted_layer(shape: ModelShape, setting: Setting) -> int:
    """Entries of the largest tensor of adapted experts."""
    return shape.layer_experts if _adapted_experts(shape, setting) else 0


def kept_factors(shape: ModelShape, setting: Setting) -> float:
    """The linear layers' factors with S2 among them, which forward leaves to backward: all, or one block's."""
    if not 0 < setting.num_sparse <= MOST_ENTRIES:
        return 0.0
    linear = [one for name in dict.fromkeys(setting.targets) for one in shape.matrices.get(name, ())]
    columns = setting.rank + setting.num_sparse
    kept = 2.0 * columns * sum(o + i for o, i in linear)
    return kept / shape.layers if setting.checkpointing else kept


def _expert_factors(shape: ModelShape, setting: Setting) -> float:
    """The thin factors of a layer's experts, S2 among their columns (`adapters.kernels.grouped`)."""
    columns = setting.rank + setting.num_sparse
    largest = max((o + i for sizes in _adapted_experts(shape, setting) for o, i in sizes), default=0)
    return 2.0 * shape.experts_of_a_layer * columns * largest


def _stored_base(shape: ModelShape, setting: Setting) -> float:
    """Bytes of all base weights, without the scales of quantised ones."""
    return shape.block_entries * bytes_per_entry(setting.quantize) + shape.other_entries * 2.0


def _scales(shape: ModelShape, setting: Setting) -> float:
    """Scales of quantised weights, which every GPU keeps."""
    if setting.quantize is None:
        return 0.0
    if setting.quantize == "int8":
        return 4.0 * sum(o for sizes in shape.matrices.values() for o, _ in sizes)
    return 4.0 * shape.block_entries / 64


def _live_weights(shape: ModelShape, setting: Setting) -> float:
    """Whole weights at once: ZeRO-3 keeps those of the last blocks between forward and backward.

    A layer's experts are whole together, however large they are.
    """
    kept = max(REUSE_DISTANCE / 2, shape.expert_entries / shape.layers) + PREFETCH_BUCKET
    return _weights_within(shape, setting, kept)


def _gathered(shape: ModelShape, setting: Setting) -> float:
    """What arrives together: DeepSpeed copies each weight out of it and frees it after the last one."""
    return _weights_within(shape, setting, PREFETCH_BUCKET)


def _weights_within(shape: ModelShape, setting: Setting, limit: float) -> float:
    """Bytes of at most so many elements of the model. Stored ones are counted: two four-bit codes lie in one."""
    width = bytes_per_entry(setting.quantize)
    stored = shape.block_entries * (width if setting.quantize else 1.0) + shape.expert_entries
    per_element = 1.0 if setting.quantize and not shape.expert_entries else 2.0
    elements = stored + shape.vocab * shape.hidden * (1 if shape.tied else 2)
    elements += travelling_entries(shape, setting)
    kept = min(elements, limit)
    from_blocks = max(0.0, kept - shape.vocab * shape.hidden)
    return from_blocks * per_element + min(kept, shape.vocab * shape.hidden) * 2.0


def _decoded(shape: ModelShape, setting: Setting) -> float:
    """The largest weight decoded for its product."""
    return 0.0 if setting.quantize is None else 2.0 * shape.largest


def _activations(shape: ModelShape, setting: Setting) -> float:
    """What backward needs of the forward pass, and the logits with their gradients."""
    logits = setting.labels * setting.tokens * shape.vocab * (2 + 4 + 4 + 4)
    if setting.checkpointing:
        kept = _forward_activations(shape, setting) - _block_activations(shape, setting)
        return kept + max(2 * _block_activations(shape, setting), logits)
    return _forward_activations(shape, setting) + logits


def _forward_activations(shape: ModelShape, setting: Setting) -> float:
    """What there is when the last block has been computed."""
    block = _block_activations(shape, setting)
    if setting.checkpointing:
        return shape.layers * setting.tokens * shape.hidden * 2 + block
    return shape.layers * block


def _block_activations(shape: ModelShape, setting: Setting) -> float:
    """What backward needs of one block."""
    hidden, width = shape.hidden, shape.width
    attention = 2 * (shape.repeated * 4)  # q, repeated k and v, and the output
    norms = 2 * 4 * hidden
    feed_forward = (6 if shape.gated else 8) * width
    adapters = 2 * hidden * bool(setting.targets)
    inputs = 2 * (3 * hidden + width) if setting.quantize == "int8" else 0  # its backward keeps every input
    routed = 2 * 2 * shape.chosen * hidden  # what goes into a token's experts, and what comes out
    return setting.tokens * (attention + norms + feed_forward + adapters + inputs + routed)


def _traffic(shape: ModelShape, setting: Setting) -> float:
    """Bytes that a GPU receives in a step: weights for forward and backward, gradients once."""
    others = (setting.gpus - 1) / setting.gpus
    gathered = _stored_base(shape, setting) + 2.0 * travelling_entries(shape, setting)
    passes = 3 if setting.checkpointing else 2
    return others * (gathered * passes + 4.0 * adapter_entries(shape, setting))


def _decomposed_entries(shape: ModelShape, setting: Setting) -> int:
    return sum(math.prod(one) for one in _targets(shape, setting))
