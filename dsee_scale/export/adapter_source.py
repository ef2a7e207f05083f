"""Where an adapter's matrices come from: a live model, wherever its weights are, or a saved folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers, delta_record, weight_name
from dsee_scale.adapters.state import model_state, warn_of_loaded_zeros
from dsee_scale.algorithms.delta import AdapterSpec, Delta
from dsee_scale.checkpoint.adapter_file import open_adapter, read_layer
from dsee_scale.checkpoint.files import read_json
from dsee_scale.checkpoint.folder import StoredFolder
from dsee_scale.checkpoint.identity import REFIT, base_identity, check_base, config_hash, lasting_config
from dsee_scale.checkpoint.record import AdapterRecord, check_refit, trained_in_full
from dsee_scale.config import UNIT_PATTERNS
from dsee_scale.errors import FormatError
from dsee_scale.export.load import recorded_model
from dsee_scale.export.structure import Structure, find_structure
from dsee_scale.partition import Partition, open_partition, stored_dtype
from dsee_scale.pretrained import read_config


class LiveAdapter:
    """The adapter of a model in memory.

    Attributes:
        partition: the ranks; rank 0 writes.
        specs: adapted modules by name.
        supports: int32 rows and columns of S2 of each.
        dtypes: of each one's A, B and values.
        config: settings of the injection.
        base: identity of the base model.
        pruned: how each weight was pruned.
        trained: names of parameters trained in full besides.
        gone: module name -> (O,) bool, outputs of heads and neurons that were removed.
    """

    def __init__(self, module: nn.Module, partition: Partition) -> None:
        warn_of_loaded_zeros(module)
        self.partition, self._layers = partition, adapted_layers(module)
        layers: dict[str, Any] = self._layers
        self.specs = {name: layer.dsee_spec for name, layer in layers.items()}
        self.supports = {name: (layer.dsee_rows, layer.dsee_cols) for name, layer in layers.items()}
        self.dtypes = {name: stored_dtype(layer.dsee_flat) for name, layer in layers.items()}
        self.config, self.pruned = model_state(module).config, model_state(module).pruned
        self.base, self.trained = base_identity(module), list(trained_in_full(module))
        self.gone = _removed_outputs(self.specs, find_structure(module, partition.shape))

    def read(self, names: Sequence[str]) -> list[Delta]:
        """Collective. Whole copies of their parameters on every rank; no base weight."""
        layers: list[Any] = [self._layers[name] for name in names]
        flats = self.partition.gather([layer.dsee_flat for layer in layers])
        return [delta_record(layer, flat) for layer, flat in zip(layers, flats, strict=True)]


class StoredAdapter:
    """The adapter of a saved folder, with the same attributes."""

    def __init__(self, stored: StoredFolder) -> None:
        record = AdapterRecord.read(stored)
        self.partition = open_partition(nn.Module())
        self.specs, self.config, self.base = record.modules, record.config, record.base
        self.pruned, self.trained = record.pruned, list(record.trained)
        self._reader = open_adapter(stored, record)
        parts = {name: read_layer(self._reader, name, spec) for name, spec in self.specs.items()}
        self.supports = {name: (rows, cols) for name, (*_, rows, cols) in parts.items()}
        self.dtypes = {name: a.dtype for name, (a, *_) in parts.items()}
        structure = None
        if any(kind in how for how in record.pruned.values() for kind in UNIT_PATTERNS):
            model = recorded_model(record.base, record.pruned, str(stored.path))
            structure = find_structure(model, lambda param: param.shape)
        self.gone = _removed_outputs(self.specs, structure)

    def read(self, names: Sequence[str]) -> list[Delta]:
        """D of some modules."""
        return [Delta(self.specs[n], *read_layer(self._reader, n, self.specs[n])) for n in names]


AdapterSource = LiveAdapter | StoredAdapter


def _removed_outputs(specs: Mapping[str, AdapterSpec], structure: Structure | None) -> dict[str, Tensor]:
    """Adapted modules that lost outputs with their heads or neurons: (O,) bool, True where gone."""
    found: dict[str, Tensor] = {}
    cuts = structure.cuts if structure is not None else {}
    for name, spec in specs.items():
        for cut in cuts.get(weight_name(name, spec), ()):
            if cut.axis == (1 if spec.transposed else 0):
                gone = torch.ones(spec.shape[0], dtype=torch.bool)
                gone[cut.indices] = False
                found[name] = gone
    return found


def check_base_folder(record: AdapterRecord, base: Path, where: str) -> None:
    """Refuse a base's folder whose config is not that of the model that an adapter was trained on. Local.

    Raises:
        FormatError: naming what differs.
    """
    if record.base.get("config") is None or not (base / "config.json").is_file():
        return
    from transformers import CONFIG_MAPPING

    raw = read_json(base / "config.json")
    try:  # a model with code of its own is compared by what its file says: the code is never run
        known = str(raw.get("model_type")) in CONFIG_MAPPING
        config = read_config(base) if known else None
    except Exception as error:  # each config class refuses values in its own way
        raise FormatError(f"{base / 'config.json'} cannot be read: {error}") from error
    values = lasting_config(raw if config is None else config.to_dict())
    check_base(record.base, {"id": str(base), "config": values, "config_sha256": config_hash(values)}, where)
    check_refit(record, raw.get(REFIT), where)
