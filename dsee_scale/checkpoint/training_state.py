"""A checkpoint from which training goes on, on any number of ranks, any ZeRO stage, or none.

The folder holds an adapter (so `load_adapter` reads it too), and besides
`dsee_optimizer*.safetensors`: float32 master values and moments of every trained parameter, whole and flat,
under `<parameter>/master`, `<parameter>/exp_avg` and so on; `dsee_random*.safetensors`: the random
generators of each rank; `dsee_state.json`: counters, optimizer settings, and the caller's own record. Frozen
weights never enter it; of pruned ones there is one bit per entry. All ranks write at the same time.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import BUFFERS, adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.bits import count_nonzero
from dsee_scale.checkpoint.adapter import apply_masks, check_contents, write_adapter
from dsee_scale.checkpoint.adapter_file import STEM as ADAPTER_STEM
from dsee_scale.checkpoint.adapter_file import open_adapter, read_layer
from dsee_scale.checkpoint.files import damaged
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder, open_folder
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.masks import has_masks, masks_now, note_files, open_masks
from dsee_scale.checkpoint.record import CONFIG_FILE, COUNTERS, AdapterRecord, check_model, check_state
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec, part_name, write_dealt, write_tensors
from dsee_scale.checkpoint.unfinished import UnfinishedState
from dsee_scale.distributed import gather_objects, raise_on_all_ranks
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.partition import Partition, is_engine, open_partition, unwrap
from dsee_scale.partition.engine_state import open_optimizer
from dsee_scale.partition.optimizer_state import MASTER, OptimizerState
from dsee_scale.pruning.zero_lines import clear_waiting
from dsee_scale.random_state import random_state, set_random_state
from dsee_scale.scheduler_values import put_scheduler_values, scheduler_values

logger = logging.getLogger(__name__)

KIND = "training_state"
OPTIMIZER = "dsee_optimizer"
RANDOM = "dsee_random"
STATE_FILE = "dsee_state.json"


def save_training_state(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Any = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Collective. Write everything that training needs to go on, and wait until it is on the disk.

    Call it between optimizer steps. Extra memory per rank: one batch of 64 MiB, or the largest trained parameter.

    Args:
        model: a DeepSpeed engine, or a model whose optimizer is given apart.
        folder: output folder, on storage that all ranks share.
        optimizer: a torch optimizer; not used with an engine.
        extra: the caller's own record as plain JSON values: phase, position in the data, scheduler, ...
        overwrite: replace an earlier checkpoint in this folder.

    Raises:
        PartitionError: an engine whose optimizer state cannot be reached.
        ConfigError: `extra` is no JSON, the folder is not empty, or the optimizer keeps what no state can
            hold, as Adafactor does for a matrix and AdEMAMix.
        FormatError: writing failed, e.g. no space is left; what was there before stays.
    """
    start_training_state(model, folder, optimizer=optimizer, extra=extra, overwrite=overwrite).finish()


def start_training_state(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Any = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> UnfinishedState:
    """Collective. `save_training_state` in two parts: training may go on, prune included, before the second one.

    Args:
        model, folder, optimizer, extra, overwrite: as there.

    Returns:
        What to `finish`, on all ranks at the same point, before the next state is started.
    """
    module, partition = unwrap(model), open_partition(model)
    with raise_on_all_ranks(partition):
        state = open_optimizer(model, optimizer)
        _check_boundary(model, state)
        clear_waiting(state.keepers)
        record = _state_record(model, state, partition, extra)
    # A rank that holds no entry of what is trained knows none.
    record["moments"] = list(dict.fromkeys(itertools.chain(*gather_objects(record["moments"]))))
    record["scalars"] = dict(itertools.chain(*(each.items() for each in gather_objects(record["scalars"]))))
    record["kept"] = kept = state.kept(list(record["scalars"]))
    record["steps"] = {name: int(kept.get(name, {}).get("step", 0)) for name in state.sizes}
    new = NewFolder(partition, folder, kind=KIND, later=True)
    new.begin(overwrite)
    try:
        masks = write_adapter(partition, module, new, mask_files=partition.world_size, link=True)
        keys = [MASTER, *record["moments"]]
        items = {f"{name}/{key}": (name, key) for name in state.sizes for key in keys}
        specs = [TensorSpec(i, torch.float32, (state.sizes[name],)) for i, (name, _) in items.items()]

        def produce(shares: list[list[str]]) -> list[Tensor]:
            whole = state.gather([items[name] for share in shares for name in share])
            before = sum(map(len, shares[: partition.rank]))
            return whole[before : before + len(shares[partition.rank])]

        write_dealt(partition, new, OPTIMIZER, specs, produce, files=partition.world_size, kind=KIND)
        with raise_on_all_ranks(partition):
            name = part_name(RANDOM, partition.rank, partition.world_size)
            own = {f"{partition.rank}/{key}": value for key, value in random_state().items()}
            write_tensors(new, name, own, kind=KIND)
            if partition.rank == 0:
                new.write_json(STATE_FILE, record)
    except BaseException:
        new.discard()
        raise
    return UnfinishedState(module, new, masks)


def load_training_state(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Any = None,
    settings: bool = True,
    generators: bool = True,
) -> dict[str, Any]:
    """Collective. Set adapters, optimizer, masks, counters and random generators as they were.

    The model needs its adapters already, on the same supports: call `load_adapter(model, folder)` on the raw
    model, then `deepspeed.initialize`, then this. Each rank reads its own part of every tensor.

    Args:
        model: a DeepSpeed engine, or a model whose optimizer is given apart.
        folder: what `save_training_state` wrote, on any number of ranks and any ZeRO stage.
        optimizer: a torch optimizer; not used with an engine.
        settings: restore learning rates and other settings of the optimizer's groups, and the engine's
            scheduler; False where a new phase brings its own.
        generators: restore the random generators.

    Returns:
        The caller's own record, `extra`.

    Raises:
        FormatError: a file is damaged, of another version, or does not fit this model.
        PartitionError: an engine whose optimizer state cannot be reached.
    """
    module, partition = unwrap(model), open_partition(model)
    with raise_on_all_ranks(partition):
        stored = open_folder(folder, (KIND,))
    masked = has_masks(partition, module, stored)
    with raise_on_all_ranks(partition):
        stems = (ADAPTER_STEM, OPTIMIZER, RANDOM) if masked else (ADAPTER_STEM, MASKS, OPTIMIZER, RANDOM)
        names = [name for stem in stems for name in stored.names(stem)]
        stored.verify(names, rank=partition.rank, world_size=partition.world_size)
        record, values = AdapterRecord.read(stored), stored.json(STATE_FILE)
        check_model(record, module, str(stored.path / CONFIG_FILE))
        share = {"rank": partition.rank, "world_size": partition.world_size}
        adapter = open_adapter(stored, record, **share, count_masks=not masked)
        _check_supports(module, record, adapter, stored)
        state = open_optimizer(model, optimizer)
        tensors = TensorReader.of(stored, OPTIMIZER)
        _check_parameters(state, values, tensors, stored)
    if not masked:
        _reject_pruned_further(partition, module, record, stored)
    masks = None if masked else open_masks(stored)
    if masks is not None:
        check_contents(partition, module, record, masks, stored)
    apply_masks(partition, module, record, masks)
    note_files(module, masks_now(partition, module, record.kept), stored)
    with raise_on_all_ranks(partition):
        _put_all(state, values, tensors, moments=is_engine(model) or optimizer is not None)
        if settings:
            _put_settings(model, state, values)
        _put_counters(model, values["counters"])
        if generators:
            _put_generators(partition, TensorReader.of(stored, RANDOM), values["world_size"])
    state.refresh()
    return values["extra"]


def _state_record(
    model: Any, state: OptimizerState, partition: Partition, extra: dict[str, Any] | None
) -> dict[str, Any]:
    record = {
        "world_size": partition.world_size,
        "parameters": state.sizes,
        "optimizer": state.optimizer_name,
        "moments": state.moments(),
        "scalars": state.scalars(),
        "groups": state.groups(),
        "counters": {name: int(getattr(model, name, 0) or 0) for name in COUNTERS},
        "lr_scheduler": scheduler_values(_scheduler(model)),
        "loss_scaler": _loss_scaler(model),
        "extra": extra or {},
    }
    try:
        json.dumps(record["extra"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra must be plain JSON values: {error}") from error
    return record


def _check_boundary(model: Any, state: OptimizerState) -> None:
    if not is_engine(model):
        return
    every = model.gradient_accumulation_steps()
    done = model.micro_steps % every
    found = f"{done} of {every} micro-batches of a step are done" if done else ""
    if model._is_gradient_accumulation_boundary is not None:
        # The loop says where a step ends, as accelerate's does, and calls step() only there: nothing counts.
        waiting = state.waiting if state.sharded else not model._is_gradient_accumulation_boundary
        found = "micro-batches of an unfinished step are done" if waiting else ""
    if found:
        raise ConfigError(
            f"{found}, whose gradients would be lost; save the training state after engine.step() has made an update"
        )


def _check_supports(
    module: nn.Module, record: AdapterRecord, tensors: TensorReader, stored: StoredFolder
) -> None:
    layers: dict[str, Any] = adapted_layers(module)
    advice = "call load_adapter(model, folder) on the raw model instead of inject"
    if layers.keys() != record.modules.keys():
        only = sorted(layers.keys() ^ record.modules.keys())
        raise FormatError(f"{stored.path}: adapted modules differ from the model's, e.g. {only[0]}; {advice}")
    for name, layer in layers.items():
        for key, saved in zip(BUFFERS, read_layer(tensors, name, record.modules[name])[3:], strict=True):
            if not torch.equal(getattr(layer, key).cpu(), saved):
                where = tensors.where(f"{name}.{key}")
                raise FormatError(f"{where}: {name}.{key} is not the support in the model; {advice}")


def _reject_pruned_further(
    partition: Partition, module: nn.Module, record: AdapterRecord, stored: StoredFolder
) -> None:
    """Collective. Refuse a model with zeros that the state lacks: there is no way back from them.

    Raises:
        FormatError: naming a weight.
    """
    params = dict(module.named_parameters())
    names = [n for n in model_state(module).pruned if n in params and id(params[n]) not in partition.codecs]
    mine = torch.tensor([count_nonzero(partition.shard(params[name]).data) for name in names])
    for name, found in zip(names, partition.sum_over_shards(mine.long()).tolist(), strict=True):
        if found < record.kept.get(name, found + 1):
            raise FormatError(
                f"{stored.path}: {name} was pruned after this state was saved, and zeros can't be taken back; expected "
                "the model as it was then, or before: load its base anew, load_adapter(model, folder), then this"
            )


def _check_parameters(
    state: OptimizerState, values: dict[str, Any], tensors: TensorReader, stored: StoredFolder
) -> None:
    where = stored.path / STATE_FILE
    check_state(values, where)
    if values["kept"]:
        state.expect_moments(values["moments"], where, values["scalars"], values.get("optimizer"))
    if values["parameters"] != state.sizes:
        differing = sorted({*values["parameters"].items()} ^ {*state.sizes.items()})
        raise FormatError(
            f"{where}: trained parameters differ from the model's, e.g. {differing[0][0]} with "
            f"{differing[0][1]} entries; train the same modules as before"
        )
    for name, size in state.sizes.items():
        for key in (MASTER, *values["moments"]):
            tensors.expect(f"{name}/{key}", (size,), torch.float32)
    for name, stretch in state.stretches.items():
        for key in (MASTER, *values["moments"]):
            part = tensors.read_range(f"{name}/{key}", stretch.start, stretch.start + stretch.length)
            tensors.reject_not_finite(f"{name}/{key}", part)


def _put_all(state: OptimizerState, values: dict[str, Any], tensors: TensorReader, *, moments: bool) -> None:
    clear_waiting(state.keepers)
    kept = values["kept"] if moments else {}
    if moments:
        state.put_kept(kept, values["scalars"])
    for name, stretch in state.stretches.items():
        for key in (MASTER, *values["moments"]) if name in kept else (MASTER,):
            part = tensors.read_range(f"{name}/{key}", stretch.start, stretch.start + stretch.length)
            state.put(name, key, part)


def _put_settings(model: Any, state: OptimizerState, values: dict[str, Any]) -> None:
    if not state.put_groups(values["groups"]):
        logger.warning(
            "the optimizer has %d groups, the checkpoint %d: learning rates stay as configured",
            len(state.groups()),
            len(values["groups"]),
        )
    if (scheduler := _scheduler(model)) is not None:
        with damaged(STATE_FILE):
            put_scheduler_values(scheduler, values.get("lr_scheduler"), values.get("scheduler"))
    scaler, saved = _loss_scaler(model), values.get("loss_scaler")
    if scaler is not None and saved is not None and scaler.keys() == saved.keys():
        if (autocast := _autocast_scaler(model)) is not None:
            autocast.load_state_dict(saved)
        else:
            vars(model.optimizer.loss_scaler).update(saved)


def _put_counters(model: Any, counters: dict[str, int]) -> None:
    if not is_engine(model):
        return
    for name in COUNTERS:
        setattr(model, name, counters[name])
    # On another number of ranks a step may take another number of micro-batches.
    model.micro_steps = counters["global_steps"] * model.gradient_accumulation_steps()


def _put_generators(partition: Partition, tensors: TensorReader, saved_ranks: int) -> None:
    source = partition.rank % saved_ranks
    with damaged(tensors.paths[0] if tensors.paths else RANDOM):
        names = [name for name in tensors.names() if name.startswith(f"{source}/")]
        set_random_state({n.partition("/")[2]: tensors.read(n) for n in names}, shift=partition.rank - source)


def _scheduler(model: Any) -> Any:
    return getattr(model, "lr_scheduler", None) if is_engine(model) else None


def _loss_scaler(model: Any) -> dict[str, Any] | None:
    """Where a dynamic loss scale (fp16) stands; None without one."""
    if (autocast := _autocast_scaler(model)) is not None:
        return dict(autocast.state_dict())
    scaler = getattr(getattr(model, "optimizer", None), "loss_scaler", None) if is_engine(model) else None
    if not getattr(scaler, "dynamic", False):
        return None
    return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}


def _autocast_scaler(model: Any) -> Any:
    """The GradScaler that an engine has under `torch_autocast` in float16; None without one."""
    optimizer = getattr(model, "optimizer", None) if is_engine(model) else None
    return getattr(optimizer, "torch_autocast_gradscaler", None)
