"""Put DSEE into a model: find targets, choose supports, adapt the layers, freeze the rest."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsee_scale.adapters.experts import attach_experts, fused_experts, let_gradients_through
from dsee_scale.adapters.linear import adapted_layers, attach, restore_under_mask, weight_name
from dsee_scale.adapters.matrices import find_matrices
from dsee_scale.adapters.state import MANY_ZEROS, MASK_UPDATE, model_state, reject_peft
from dsee_scale.adapters.targets import Target, find_modules, find_targets
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.algorithms.decompose import Support
from dsee_scale.algorithms.score import all_finite
from dsee_scale.config import UNIT_PATTERNS, DSEEConfig
from dsee_scale.distributed import log_rank0, raise_on_all_ranks
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.partition import Partition, is_engine, keep_experts_together, open_partition, unwrap
from dsee_scale.partition.quantized import compute_dtype, holds_numbers, prepare_quantised, quantised_kind
from dsee_scale.passes.coverage import Coverage, block_coverage
from dsee_scale.passes.decompose_model import decompose_model, seeded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did; printing it shows a table.

    Attributes:
        targets: (name, (O, I), number of slices, N per slice) for each adapted matrix.
        trainable: number of trainable parameters.
        total: number of all parameters, adapters included.
        seconds: time for decomposition and injection.
        coverage: how much of the blocks the targets are.
    """

    targets: tuple[tuple[str, tuple[int, int], int, int], ...]
    trainable: int
    total: int
    seconds: float
    coverage: Coverage

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[int, int], int, int], int] = {}
        for name, shape, slices, num_sparse in self.targets:
            key = (name.rsplit(".", 1)[-1], shape, slices, num_sparse)
            groups[key] = groups.get(key, 0) + 1
        lines = [f"dsee_scale: {len(self.targets)} modules adapted in {self.seconds:.1f} s"]
        for (suffix, (o, i), slices, num_sparse), count in groups.items():
            parts = f", {slices} slices" if slices > 1 else ""
            sparse = f"{num_sparse} sparse entries each" if num_sparse else "no sparse entries"
            lines.append(f"  {count:4d} x {suffix:<16} {o} x {i}{parts}, {sparse}")
        share = 100 * self.trainable / self.total
        lines.append(f"  {self.trainable:,} of {self.total:,} parameters are trained ({share:.3f}%)")
        lines.append(f"  the adapted matrices hold {self.coverage}")
        return "\n".join(lines)


def inject(model: nn.Module, config: DSEEConfig, *, progress: bool | None = None) -> InjectionReport:
    """Collective. Adapt the target modules of a model in place and freeze everything else.

    Call it after the weights are loaded and before `deepspeed.initialize` (or DDP, or
    `accelerator.prepare`). Outputs do not change. Weights may be partitioned by ZeRO-3: nothing is gathered
    but each matrix to the one rank that decomposes it.

    Args:
        model: a raw model, whole or partitioned.
        config: what to inject.
        progress: show a progress bar on rank 0; None: only on a terminal.

    Returns:
        A report of targets, true shapes and trainable parameters; it is logged on rank 0 too.

    Raises:
        TargetError: no such module, an unsupported or already adapted one, or a weight with NaN.
        ConfigError: a setting that does not fit a module.
    """
    started = time.perf_counter()
    if not isinstance(config, DSEEConfig):
        raise ConfigError(
            f"inject's config is {config!r:.200}; expected a DSEEConfig, such as DSEEConfig(rank=8)"
        )
    _reject_unready(model)
    prepare_quantised(model)
    partition = open_partition(model)
    targets = find_targets(model, config, partition.shape)
    for target in targets:
        partition.writable(target.weight_name, target.weight)
    _reject_not_finite(model, partition)
    trained = (
        find_modules(model, config.trained_modules, what="trained module") if config.trained_modules else []
    )
    reject_untrainable(model, targets, trained)
    supports = decompose_model(targets, config, partition, progress=progress)
    apply_adapters(model, config, targets, supports, trained, partition)
    _mask_updates(model)
    warn_of_random_weights(model)
    _warn_of_zeros(model, partition)
    report = _report(model, targets, partition, time.perf_counter() - started)
    if partition.rank == 0:
        logger.info("%s", report)
        from transformers.integrations.deepspeed import deepspeed_config

        not_resident = check_persistence(deepspeed_config() or {}, model)
        if not_resident:
            logger.info("%s", not_resident)
    return report


def _mask_updates(model: nn.Module) -> None:
    """Local. Train updates of weights that were pruned before under the mask, unless the pruning said otherwise."""
    pruned = model_state(model).pruned
    for name, layer in adapted_layers(model).items():
        weight = weight_name(name, layer.dsee_spec)
        if pruned.get(weight, {}).get("pattern", "heads") not in UNIT_PATTERNS:
            pruned[weight] = {MASK_UPDATE: True, **pruned[weight]}
    restore_under_mask(model)


def apply_adapters(
    model: nn.Module,
    config: DSEEConfig,
    targets: list[Target],
    supports: list[Support],
    trained_modules: list[str],
    partition: Partition,
) -> None:
    """Adapt the targets on given supports and set what is trainable. Local, the same on every rank."""
    for target, support in zip(targets, supports, strict=True):
        put = functools.partial(attach_experts, attribute=target.experts) if target.experts else attach
        put(
            target.module,
            spec=target.spec(config),
            rows=support.rows,
            cols=support.cols,
            generator=seeded(config.seed, f"{target.name}:A"),
            dtype=_adapter_dtype(target, partition),
            device=partition.compute_device(target.weight),
        )
    fused = [name.rpartition(".")[0] for name, module in model.named_modules() if fused_experts(module)]
    for name in (*fused, *keep_experts_together(model)):
        let_gradients_through(model.get_submodule(name))
    model_state(model).config = config
    set_trainable(model, trained_modules)
    if _checkpoints_activations(model):
        # With every input frozen, reentrant checkpointing would cut the graph before the first adapter.
        model.enable_input_require_grads()  # type: ignore[operator]


def reject_untrainable(model: nn.Module, targets: list[Target], trained_modules: list[str]) -> None:
    """Refuse modules that cannot be trained in full: quantised ones, and those that hold adapted experts. Local."""
    modules = dict(model.named_modules())
    for name in trained_modules:
        if any(map(_is_quantised, modules[name].modules())):
            raise TargetError(
                f"trained_modules: {name} is quantised, and its weights cannot be trained; expected floating-point "
                "weights: add it to llm_int8_skip_modules in the BitsAndBytesConfig, or leave it out"
            )
    for target in targets:
        owner = target.name.rpartition(".")[0]
        if target.experts and any(f"{owner}.".startswith(f"{name}.") for name in trained_modules):
            raise TargetError(
                f"{target.name} is to be adapted and trained in full as well (trained_modules); choose one of them"
            )


def _is_quantised(module: nn.Module) -> bool:
    dtypes = {param.dtype for param in module.parameters(recurse=False) if param.is_floating_point()}
    return quantised_kind(module) is not None or not all(map(holds_numbers, dtypes))


def _adapter_dtype(target: Target, partition: Partition) -> torch.dtype:
    """The weight's dtype; for a quantised layer, what it computes in."""
    codec = partition.codecs.get(id(target.weight))
    return target.weight.dtype if codec is None else compute_dtype(target.module, codec)


def _checkpoints_activations(model: nn.Module) -> bool:
    name = "is_activation_checkpointing"  # transformers before 5.20 calls it is_gradient_checkpointing
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))


def set_trainable(model: nn.Module, trained_modules: list[str]) -> None:
    """Freeze all but the adapters and the modules trained in full."""
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.dsee_flat.requires_grad_(True)
    modules = dict(model.named_modules())
    for name in trained_modules:
        for param in modules[name].parameters():
            if param.is_floating_point():
                param.requires_grad_(True)


def _warn_of_zeros(model: nn.Module, partition: Partition) -> None:
    """Collective. Say that a base which is sparse already will not stay so: nothing records its zeros as a mask."""
    layers = [layer for layer in adapted_layers(model).values() if not layer.dsee_under_mask]
    shards = [partition.shard(each.weight).data for each in layers if id(each.weight) not in partition.codecs]
    sizes = [sum(map(count_nonzero, shards)), sum(shard.numel() for shard in shards)]
    kept, numel = partition.sum_over_shards(torch.tensor(sizes)).tolist()
    if numel and kept < (1 - MANY_ZEROS) * numel:
        share = 1 - kept / numel
        log_rank0(
            logger,
            "%.1f%% of the adapted weights are zero already, and nothing records these zeros as a mask: updates will "
            "fill them, and the export will be dense. To keep them, call dsee_scale.prune(model, PruneConfig(sparsity="
            "%.3f, score='W')) after inject (pattern='2:4' for such a base), for which zeros are the first to go",
            100 * share,
            share,
        )


def warn_of_random_weights(model: nn.Module) -> None:
    """Name frozen weights with values that the next load of the base makes anew. Local."""
    params = dict(model.named_parameters())
    marks = {name: hasattr(param, "_is_hf_initialized") for name, param in params.items()}
    unknown = {name for name, loaded in marks.items() if not loaded} if any(marks.values()) else set()
    resized = _resized_embeddings(model)
    names = [
        name
        for name, param in params.items()
        if not param.requires_grad and (name in unknown or id(param) in resized)
    ]
    if names:
        log_rank0(
            logger,
            "%s and %d more hold random values, which were in no file that the model was loaded from: they stay "
            "frozen, and no adapter file will hold them. Train them in full (trained_modules), or save the model as "
            "it is (save_pretrained) and load that as the base",
            names[0],
            len(names) - 1,
        )


def _resized_embeddings(model: Any) -> set[int]:
    """Ids of the embeddings' weights where the vocabulary is not that of the folder or hub id they came from."""
    from transformers import PretrainedConfig

    config: Any = getattr(model, "config", None)
    if not getattr(config, "_name_or_path", None):
        return set()
    try:
        published = PretrainedConfig.get_config_dict(config._name_or_path, local_files_only=True)[0]
        if published["vocab_size"] == config.vocab_size:
            return set()
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except Exception:  # moved since, or of a class that says none of this
        return set()
    return {id(end.weight) for end in ends if end is not None}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer: adapters, and modules trained in full. Never empty.

    Raises:
        TargetError: nothing was injected.
    """
    module = unwrap(model)
    if not adapted_layers(module):
        raise TargetError("the model has no adapters; call dsee_scale.inject(model, config) first")
    return [param for param in module.parameters() if param.requires_grad]


def _reject_unready(model: nn.Module) -> None:
    if is_engine(model) or unwrap(model) is not model:
        raise TargetError(
            f"inject got a {type(model).__name__}; adapters must exist before the engine is made: call inject on "
            "the raw model, then deepspeed.initialize (or DDP, or accelerator.prepare)"
        )
    adapted = list(adapted_layers(model))
    if adapted:
        raise TargetError(
            f"the model already has adapters ({adapted[0]} and {len(adapted) - 1} more); inject once, "
            "on a freshly loaded model"
        )
    reject_peft(model)
    for name, param in model.named_parameters():
        if param.is_meta:
            raise TargetError(f"{name} is on the meta device; load the weights before inject")


def _reject_not_finite(model: nn.Module, partition: Partition) -> None:
    """Collective. A base whose other weights are no numbers would only show it by its loss."""
    with raise_on_all_ranks(partition):
        for name, param in model.named_parameters():
            if id(param) not in partition.codecs and not all_finite(partition.shard(param).data):
                raise TargetError(
                    f"{name} holds NaN or infinity; expected finite weights: check the checkpoint it came from"
                )


def _report(model: nn.Module, targets: list[Target], partition: Partition, seconds: float) -> InjectionReport:
    sizes = [(partition.shape(p).numel(), p.requires_grad) for p in model.parameters()]
    matrices = find_matrices(model, partition.shape).values()
    adapted = {target.weight_name for target in targets}
    return InjectionReport(
        targets=tuple((t.name, t.shape, len(t.slices), t.num_sparse) for t in targets),
        trainable=sum(n for n, trained in sizes if trained),
        total=sum(n for n, _ in sizes),
        seconds=seconds,
        coverage=block_coverage(
            model,
            [matrix for matrix in matrices if matrix.param_name in adapted],
            matrices,
            partition.shape,
        ),
    )


DEFAULT_THRESHOLD = 100_000
"""DeepSpeed's, where the config sets none."""


def check_persistence(ds_config: Mapping[str, Any], model: nn.Module) -> str | None:
    """What to tell the user if some adapters are not resident, else None. Local.

    Args:
        ds_config: DeepSpeed's JSON as a mapping; "auto" counts as the Trainer fills it in.
        model: an injected model, before or after partitioning.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return None
    threshold = zero.get("stage3_param_persistence_threshold", DEFAULT_THRESHOLD)
    if threshold == "auto":
        threshold = 10 * int(getattr(getattr(model, "config", None), "hidden_size", DEFAULT_THRESHOLD // 10))
    # From the settings: under ZeRO-3 the tensors are empty.
    sizes: dict[str, int] = {name: layer.dsee_spec.numel for name, layer in adapted_layers(model).items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if not sizes or sizes[largest] <= int(threshold):
        return None
    return (
        f"stage3_param_persistence_threshold is {int(threshold)}, and the adapter of {largest} has {sizes[largest]} "
        "elements: such adapters travel with their layer's weight, in the same message, at every use. Set it to "
        f"{sizes[largest]} or more in the DeepSpeed config to keep them resident instead: that costs their memory once "
        "per rank, and one small all-gather each after every optimizer step."
    )
