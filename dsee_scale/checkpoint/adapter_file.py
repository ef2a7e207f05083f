"""How an adapter lies in its file: names, shapes and dtypes of A, B, S2 and its positions; written, opened, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import BUFFERS, adapted_layers
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.checkpoint.folder import NewFolder, StoredFolder
from dsee_scale.checkpoint.masks import check_kept, check_masks, open_masks
from dsee_scale.checkpoint.record import AdapterRecord, trained_in_full
from dsee_scale.checkpoint.tensors import TensorReader, TensorSpec, aligned, write_dealt
from dsee_scale.errors import FormatError
from dsee_scale.partition import Partition, stored_dtype

STEM = "dsee_adapter"
KIND = "adapter"
TRAINED_KEYS = ("dsee_A", "dsee_B", "dsee_values")
"""What a layer's `dsee_flat` is in the file: tensors of their own. See `_tensor_shapes`."""
KINDS_WITH_ADAPTER = ("adapter", "training_state")


def open_adapter(
    stored: StoredFolder,
    record: AdapterRecord,
    *,
    rank: int = 0,
    world_size: int = 1,
    count_masks: bool = True,
) -> TensorReader:
    """The adapter's tensors, checked against the record: shapes, indices, finite values, and the masks' counts. Local.

    Args:
        stored: the folder.
        record: what it says.
        rank: values and masks are read of this rank's share alone, ...
        world_size: ... of so many.
        count_masks: whether the masks' bits are counted; not needed for masks that the model has already.

    Raises:
        FormatError: naming file and tensor.
    """
    reader = TensorReader.of(stored, STEM)
    for name, module in record.modules.items():
        for key, shape in _tensor_shapes(module).items():
            reader.expect(f"{name}.{key}", shape, torch.int32 if key in BUFFERS else None)
        if module.num_sparse:
            _check_support(reader, name, module)
    for name, shape in record.trained.items():
        reader.expect(name, shape)
    masks = open_masks(stored)
    check_masks(masks, {name: how["shape"] for name, how in record.pruned.items()})
    floating = [name for name in reader.names() if reader.spec(name).dtype.is_floating_point]
    for name in floating[rank::world_size]:
        reader.reject_not_finite(name, reader.read(name))
    for name, how in list(record.pruned.items())[rank::world_size] if count_masks else ():
        check_kept(masks, name, how["shape"], how["kept"])
    return reader


def read_layer(
    reader: TensorReader, name: str, spec: AdapterSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, B, values, rows and columns of one layer."""
    a, b = reader.read(f"{name}.dsee_A"), reader.read(f"{name}.dsee_B")
    if not spec.num_sparse:
        nowhere = torch.empty(0, dtype=torch.int32)
        return a, b, a.new_empty(0), nowhere, nowhere
    values, rows, cols = (reader.read(f"{name}.{key}") for key in ("dsee_values", *BUFFERS))
    return a, b, values, rows, cols


def stream_adapter(partition: Partition, module: nn.Module, new: NewFolder) -> None:
    """Collective. Write A, B and S2 of every adapted layer, and what was trained in full, in batches."""
    layers, trained = adapted_layers(module), trained_in_full(module)
    specs = aligned(
        [spec for name, layer in layers.items() for spec in _layer_specs(name, layer)]
        + [TensorSpec(name, partition.dtype(p), tuple(partition.shape(p))) for name, p in trained.items()]
    )

    def produce(shares: list[list[str]]) -> list[Tensor]:
        whole = _gathered(partition, shares[0], layers, trained)
        return [whole[name] for name in shares[0]] if partition.rank == 0 else []

    write_dealt(partition, new, STEM, specs, produce, files=1, kind=KIND)


def _layer_specs(name: str, layer: Any) -> list[TensorSpec]:
    """An adapted layer's tensors in the file."""
    return [
        TensorSpec(f"{name}.{key}", torch.int32 if key in BUFFERS else stored_dtype(layer.dsee_flat), shape)
        for key, shape in _tensor_shapes(layer.dsee_spec).items()
    ]


def _tensor_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Of one layer in the file. S2 is left out where it has no entries: no file holds a tensor of size 0."""
    a, b, values = spec.shapes
    sparse = {key: values for key in ("dsee_values", *BUFFERS)} if spec.num_sparse else {}
    return {"dsee_A": a, "dsee_B": b, **sparse}


def _gathered(
    partition: Partition, names: list[str], layers: dict[str, Any], trained: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Collective. The named tensors of the file, and what comes with them; trained values alone travel, all at once."""
    whole: dict[str, Tensor] = {}
    owners: dict[str, None] = {}
    for name in [name for name in names if name not in trained]:
        owner, _, key = name.rpartition(".")
        if key in BUFFERS:
            # Whole on every rank; in 16 bits a batch may hold those of all layers, and nothing else.
            whole[name] = getattr(layers[owner], key)
        else:
            owners[owner] = None
    params = [trained[name] for name in names if name in trained]
    flats = partition.gather([layers[owner].dsee_flat for owner in owners] + params)
    whole.update(zip([name for name in names if name in trained], flats[len(owners) :], strict=True))
    for owner, flat in zip(owners, flats, strict=False):
        parts = layers[owner].dsee_spec.split(flat)
        whole.update({f"{owner}.{key}": part for key, part in zip(TRAINED_KEYS, parts, strict=True)})
    return whole


def _check_support(reader: TensorReader, name: str, module: AdapterSpec) -> None:
    rows = reader.read(f"{name}.dsee_rows").long().view(len(module.slices), -1)
    cols = reader.read(f"{name}.dsee_cols").long().view(len(module.slices), -1)
    for k, (start, stop) in enumerate(module.slices):
        for key, values, low, high in (
            ("dsee_rows", rows[k], start, stop),
            ("dsee_cols", cols[k], 0, module.shape[1]),
        ):
            if bool(((values < low) | (values >= high)).any()):
                raise FormatError(
                    f"{reader.where(f'{name}.{key}')}: tensor {name}.{key} has indices out of range: "
                    f"{int(values.min())} to {int(values.max())}, expected {low} to {high - 1}; the file is "
                    "damaged or belongs to another model"
                )
    if bool(((rows * module.shape[1] + cols).diff(dim=1) <= 0).any()):
        raise FormatError(
            f"{reader.where(f'{name}.dsee_rows')}: the support of {name} is not sorted by "
            "(row, column) or repeats a position; the file is damaged"
        )
