"""Save and load an adapter: A, B, S2, the modules trained in full, and the masks. Never a base weight.

A folder holds `dsee_config.json` (see `AdapterRecord`), what is trained in `dsee_adapter.safetensors`, and where
weights were pruned `dsee_masks.safetensors`. The names differ from PEFT's on purpose: transformers looks for those.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from torch import nn

from dsee_scale.adapters.experts import fused_experts
from dsee_scale.adapters.linear import adapted_layers, restore_under_mask
from dsee_scale.adapters.routers import mask_routers
from dsee_scale.adapters.state import model_state, reject_broken, warn_of_loaded_zeros
from dsee_scale.adapters.targets import Target, linear_kind, reject_codes
from dsee_scale.algorithms.decompose import Support
from dsee_scale.checkpoint.adapter_file import (
    KIND,
    KINDS_WITH_ADAPTER,
    STEM,
    open_adapter,
    read_layer,
    stream_adapter,
)
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder, new_folder, open_folder
from dsee_scale.checkpoint.identity import other_base, other_weights
from dsee_scale.checkpoint.lora_folder import is_lora_folder, load_lora, open_lora
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.masks import (
    apply_mask,
    link_masks,
    masked_sum,
    masks_now,
    note_files,
    open_masks,
    save_masks,
)
from dsee_scale.checkpoint.record import (
    CONFIG_FILE,
    AdapterRecord,
    check_model,
    describe,
    frozen_weights,
    trained_modules,
)
from dsee_scale.checkpoint.tensors import (
    TensorReader,
)
from dsee_scale.config import SupportMethod
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError, DSEEError, FormatError, TargetError
from dsee_scale.partition import Partition, is_engine, open_partition, unwrap
from dsee_scale.partition.quantized import prepare_quantised
from dsee_scale.passes.fingerprint import as_text, is_other_sample, samples
from dsee_scale.passes.inject_model import apply_adapters, reject_untrainable, warn_of_random_weights

logger = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Collective. Write what was trained and which weights were removed: adapter, masks, settings.

    Parameters are gathered in batches of 64 MiB, masks as one bit per entry; no base weight is gathered.
    The folder appears when it is complete; if anything fails, what was there before stays.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it.
        folder: output folder; parents are made.
        overwrite: replace an earlier saved folder. A folder with other files in it is never replaced.

    Raises:
        TargetError: nothing was injected or pruned.
        ConfigError: the folder is not empty.
        FormatError: writing failed, e.g. no space is left.
    """
    module, partition = unwrap(model), open_partition(model)
    reject_broken(module)
    with new_folder(partition, folder, kind=KIND, overwrite=overwrite) as new:
        write_adapter(partition, module, new)


def load_adapter(
    model: nn.Module, folder: str | Path, *, num_sparse: float | None = 0, support: SupportMethod = "grebsmo"
) -> AdapterRecord:
    """Collective. Put a saved adapter into a freshly loaded base model, and apply its masks in place.

    Call it where `inject` would stand: after the weights are loaded, before `deepspeed.initialize`. Every rank reads
    the files; masks are applied shard by shard. The base is the one that the adapter was trained on: `base_of` names
    a checkpoint's.

    Args:
        model: the base model, raw.
        folder: what `save_adapter` or `save_training_state` wrote; or a LoRA folder of stock PEFT, to go on from.
        num_sparse: for a PEFT folder: N, trainable entries of S2 per matrix, as in `DSEEConfig`; they start at zero.
        support: for a PEFT folder: how their positions are chosen.

    Returns:
        What the files say.

    Raises:
        TargetError: the model is an engine, has adapters already, or is quantised in a way that is not known here.
        ConfigError: `num_sparse` where the folder has its own.
        FormatError: a file is damaged, of another version, or made for another model.
    """
    partition = open_partition(model)
    with raise_on_all_ranks(partition):
        _reject_unready(model)
        prepare_quantised(model)
        lora = open_lora(folder) if is_lora_folder(folder) else None
        if lora is None and num_sparse:
            raise ConfigError(
                f"num_sparse {num_sparse!r} goes with a PEFT folder; the adapter in {folder} has its own: leave it out"
            )
    if lora is not None:
        return load_lora(partition, model, lora, num_sparse=num_sparse, support=support)
    with raise_on_all_ranks(partition):
        stored = open_folder(folder, KINDS_WITH_ADAPTER)
        names = stored.names(STEM) + stored.names(MASKS)
        stored.verify(names, rank=partition.rank, world_size=partition.world_size)
        record = AdapterRecord.read(stored)
        check_model(record, model, str(stored.path / CONFIG_FILE))
        tensors = open_adapter(stored, record, rank=partition.rank, world_size=partition.world_size)
        masks = open_masks(stored)
        targets = _targets(partition, model, record, stored)
        _check_weights(partition, model, record, stored)
    check_contents(partition, model, record, masks, stored)
    _warn_of_other_base(partition, model, record, stored)
    with raise_on_all_ranks(partition):
        _attach(partition, model, record, targets, tensors)
    _set_values(partition, model, record, tensors)
    apply_masks(partition, model, record, masks)
    note_files(model, masks_now(partition, model, record.kept), stored)
    return record


def write_adapter(
    partition: Partition, module: nn.Module, new: NewFolder, *, mask_files: int = 1, link: bool = False
) -> dict[str, int]:
    """Collective. Write an adapter's files into a folder in the making.

    Args:
        partition: port to the model's weights.
        module: the unwrapped model.
        new: the folder.
        mask_files: number of files for the masks.
        link: whether the mask files of an earlier folder may be taken, in whatever number.

    Returns:
        Number of entries that each pruned weight keeps.
    """
    warn_of_loaded_zeros(module)
    params = dict(module.named_parameters())
    with raise_on_all_ranks(partition):
        missing = [name for name in model_state(module).pruned if name not in params]
        if missing:
            raise TargetError(
                f"pruned weight {missing[0]} is gone from the model; save before changing its modules"
            )
    pruned = {name: params[name] for name in model_state(module).pruned}
    kept = link_masks(partition, new, module) if link and pruned else None
    if kept is None:
        kept = save_masks(partition, new, pruned, min(mask_files, partition.world_size)) if pruned else {}
    with raise_on_all_ranks(partition):
        record, frozen = describe(partition, module, kept), frozen_weights(module)
    record = dataclasses.replace(record, samples=samples(frozen, partition))
    with raise_on_all_ranks(partition):
        if partition.rank == 0:
            new.write_json(CONFIG_FILE, record.to_dict())
    stream_adapter(partition, module, new)
    return kept


def apply_masks(
    partition: Partition, model: nn.Module, record: AdapterRecord, masks: TensorReader | None
) -> None:
    """Collective. Zero the entries that the masks remove, in place (None: they are zero), and note it on the model."""
    params = dict(model.named_parameters())
    with raise_on_all_ranks(partition):
        for name in record.pruned if masks is not None else ():
            apply_mask(partition, params[name], masks, name)  # type: ignore[arg-type]
    how = {
        name: {k: v for k, v in p.items() if k not in ("shape", "kept")} for name, p in record.pruned.items()
    }
    model_state(model).pruned.update(how)
    restore_under_mask(model)
    mask_routers(model, partition.shape)


def _reject_unready(model: nn.Module) -> None:
    if is_engine(model) or unwrap(model) is not model:
        raise TargetError(
            f"load_adapter got a {type(model).__name__}; adapters must exist before the engine is made: call "
            "load_adapter on the raw model, then deepspeed.initialize (or DDP, or accelerator.prepare). "
            "To set the values of adapters that are there, use load_training_state"
        )
    adapted = list(adapted_layers(model))
    if adapted:
        raise TargetError(
            f"the model already has adapters ({adapted[0]} and {len(adapted) - 1} more); load into a freshly "
            "loaded base model"
        )


def _targets(
    partition: Partition, model: nn.Module, record: AdapterRecord, stored: StoredFolder
) -> list[Target]:
    modules, where = dict(model.named_modules()), stored.path / CONFIG_FILE
    targets = []
    for name, saved in record.modules.items():
        owner, _, attribute = name.rpartition(".")
        layer = modules.get(owner if saved.experts else name)
        fits = layer is not None and (
            attribute in fused_experts(layer) if saved.experts else linear_kind(layer)
        )
        if layer is None or not fits:
            found = "nothing" if layer is None else type(layer).__name__
            raise FormatError(
                f"{where}: adapted module {name} is {found} in this model, expected "
                f"{'experts' if saved.experts else 'a linear layer'} of shape {saved.shape}; load the base that the "
                "adapter was made for"
            )
        target = Target(
            name, layer, saved.shape, saved.transposed, saved.slices, saved.num_sparse,
            experts=attribute if saved.experts else None,
        )  # fmt: skip
        reject_codes(name, layer, target.weight)
        expected = (len(saved.slices), saved.width, saved.shape[1]) if saved.width else saved.storage_shape
        if tuple(partition.shape(target.weight)) != expected:
            raise FormatError(
                f"{where}: {target.weight_name} is {tuple(partition.shape(target.weight))} in this model, the adapter "
                f"was made for {expected}; load the base that it was made for"
            )
        if record.config is None or target.spec(record.config) != saved:
            raise FormatError(
                f"{where}: {name} and `config` contradict each other (rank {saved.rank}, scaling {saved.scaling:g}, "
                f"dropout {saved.dropout:g}); the file is damaged"
            )
        targets.append(target)
    return targets


def _check_weights(
    partition: Partition, model: nn.Module, record: AdapterRecord, stored: StoredFolder
) -> None:
    params = dict(model.named_parameters())
    shapes = {**{name: how["shape"] for name, how in record.pruned.items()}, **record.trained}
    for name, shape in shapes.items():
        found = tuple(partition.shape(params[name])) if name in params else None
        if found != tuple(shape):
            raise FormatError(
                f"{stored.path / CONFIG_FILE}: {name} is {found or 'missing'} in this model, the file has "
                f"{tuple(shape)}; load the base that it was made for"
            )
        partition.writable(name, params[name])


def check_contents(
    partition: Partition, model: nn.Module, record: AdapterRecord, masks: TensorReader, stored: StoredFolder
) -> None:
    """Collective. Re-fitted weights must be those that the files were made with; nothing is written.

    Raises:
        FormatError: naming the weight and the base to load.
    """
    params = dict(model.named_parameters())
    expected = {name: how["content"] for name, how in record.pruned.items() if "content" in how}
    sums: list[int] = []
    with raise_on_all_ranks(partition):
        sums += [masked_sum(partition, params[name], masks, name) for name in expected]
    found = partition.sum_over_shards(torch.tensor(sums, dtype=torch.int64)).tolist()
    pairs = zip(expected.items(), found, strict=True)
    others = [name for (name, content), total in pairs if as_text(total) != content]
    sampled = {name: params[name] for name in others if name in record.samples}
    if sampled and all(params[name].dtype is torch.float16 for name in others):
        # A checksum survives rounding from float32 to bfloat16, by way of float16 it doesn't.
        rows = samples(sampled, partition)
        others = [name for name, row in rows.items() if is_other_sample(record.samples[name], row)]
    if others:
        raise FormatError(other_base(str(stored.path / CONFIG_FILE), others[0]))


def _warn_of_other_base(
    partition: Partition, model: nn.Module, record: AdapterRecord, stored: StoredFolder
) -> None:
    """Collective. Say so if frozen weights are not those that the adapter was trained on."""
    weights = {name: param for name, param in model.named_parameters() if name in record.samples}
    found = samples(weights, partition)
    differing = [name for name, row in found.items() if is_other_sample(record.samples[name], row)]
    if differing and partition.rank == 0:
        logger.warning("%s", other_weights(str(stored.path / CONFIG_FILE), record.base, differing[0]))


def _attach(
    partition: Partition,
    model: nn.Module,
    record: AdapterRecord,
    targets: list[Target],
    tensors: TensorReader,
) -> None:
    if record.config is None:
        return
    supports = [Support(*read_layer(tensors, t.name, record.modules[t.name])[3:]) for t in targets]
    try:
        trained = trained_modules(model, record.config)
        reject_untrainable(model, targets, trained)
        apply_adapters(model, record.config, targets, supports, trained, partition)
    except DSEEError as error:
        raise FormatError(f"{tensors.paths[0]} does not fit this model: {error}") from error
    params = dict(model.named_parameters())
    for name in record.trained:
        params[name].requires_grad_(True)
    warn_of_random_weights(model)


def _set_values(partition: Partition, model: nn.Module, record: AdapterRecord, tensors: TensorReader) -> None:
    params, layers = dict(model.named_parameters()), adapted_layers(model)
    for name, spec in record.modules.items():
        parts = [part.reshape(-1) for part in read_layer(tensors, name, spec)[:3]]
        partition.assign([layers[name].dsee_flat], [torch.cat(parts)])  # type: ignore[list-item]
    for name in record.trained:
        partition.assign([params[name]], [tensors.read(name)])
