"""What saved files hold, as `dsee_config.json` (an adapter) and `dsee_state.json` (a training state) say.

The one description that all readers share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state, reject_part
from dsee_scale.adapters.targets import find_modules
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.checkpoint.files import damaged
from dsee_scale.checkpoint.folder import StoredFolder
from dsee_scale.checkpoint.identity import base_identity, base_label, check_base, content_mark, refit_mark
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.partition.optimizer_state import as_kept
from dsee_scale.partition.port import Partition
from dsee_scale.passes.fingerprint import SAMPLED, is_other_sample, sample
from dsee_scale.settings import type_problems

CONFIG_FILE = "dsee_config.json"
PREFIX = "dsee_"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
MOST_RANKS = 10**6


@dataclass(frozen=True)
class AdapterRecord:
    """Everything but the tensors.

    Attributes:
        base: identity of the base model, see `base_identity`.
        config: settings of the injection, None where the model was only pruned.
        modules: adapted modules by name.
        trained: true shapes of parameters trained in full, by name.
        pruned: pruned weights by name: true `shape`, number of `kept` entries, and how they were pruned.
        samples: a few entries of frozen weights by name, see `fingerprint.samples`; none in what older versions wrote.
    """

    base: dict[str, Any]
    config: DSEEConfig | None
    modules: dict[str, AdapterSpec] = field(default_factory=dict)
    trained: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def refitted(self) -> bool:
        """Whether frozen weights were solved anew, so that the published base does not have them."""
        return any("content" in how for how in self.pruned.values())

    @property
    def refit(self) -> str | None:
        """`refit_mark` of the model that was saved; None in what older versions wrote of a model not re-fitted."""
        return content_mark(self.pruned) or self.base.get("refit")

    @property
    def kept(self) -> dict[str, int]:
        """Number of entries that each pruned weight keeps."""
        return {name: how["kept"] for name, how in self.pruned.items()}

    def is_other(self, name: str, weight: Tensor) -> bool:
        """Whether a whole weight is another one than the adapter was trained on, as far as its sample tells. Local."""
        if name not in self.samples:
            return False
        found = sample(weight)
        return is_other_sample(self.samples[name][: len(found)], found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "base_model": self.base,
            "config": self.config.to_dict() if self.config else None,
            "modules": {name: dataclasses.asdict(module) for name, module in self.modules.items()},
            "trained": {name: list(shape) for name, shape in self.trained.items()},
            "pruned": self.pruned,
            "samples": self.samples,
        }

    @classmethod
    def read(cls, stored: StoredFolder) -> AdapterRecord:
        """From a saved folder.

        Raises:
            FormatError: a value is missing or makes no sense.
        """
        values = stored.json(CONFIG_FILE)
        with damaged(stored.path / CONFIG_FILE):
            if values["modules"] and not values["config"]:
                raise ConfigError("modules are adapted but `config` is empty")
            return cls(
                base=dict(values["base_model"]),
                config=DSEEConfig.from_dict(values["config"]) if values["config"] else None,
                modules={name: _module_record(name, m) for name, m in values["modules"].items()},
                trained={name: _shape(name, shape) for name, shape in values["trained"].items()},
                pruned={name: _pruned_record(name, p) for name, p in values["pruned"].items()},
                samples={name: _sample(name, row) for name, row in values.get("samples", {}).items()},
            )

    @property
    def num_trainable(self) -> int:
        """Entries of A, B, S2 and of the parameters trained in full."""
        return sum(spec.numel for spec in self.modules.values()) + sum(map(math.prod, self.trained.values()))


def describe(partition: Partition, model: nn.Module, kept: Mapping[str, int]) -> AdapterRecord:
    """The record of a model that was injected, pruned, or both. Local.

    Args:
        partition: port to the model's weights.
        model: the unwrapped model.
        kept: number of entries that are not zero, of each pruned weight.
    """
    reject_part(model)
    state = model_state(model)
    layers: dict[str, Any] = adapted_layers(model)
    modules = {name: layer.dsee_spec for name, layer in layers.items()}
    if not modules and not state.pruned:
        raise TargetError(
            "the model has no adapter and no pruned weight: there is nothing to save; "
            "call dsee_scale.inject first"
        )
    params = dict(model.named_parameters())
    pruned = {
        name: {**how, "shape": tuple(partition.shape(params[name])), "kept": kept[name]}
        for name, how in state.pruned.items()
    }
    trained = {name: tuple(partition.shape(param)) for name, param in trained_in_full(model).items()}
    return AdapterRecord(base_identity(model), state.config, modules, trained, pruned)


def trained_in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters besides the adapters' that an injected model trains, by name."""
    config = model_state(model).config
    if config is None:
        return {}
    declared = trained_modules(model, config)
    return {
        name: param
        for name, param in model.named_parameters()
        if not is_adapter_key(name) and (param.requires_grad or name.rpartition(".")[0] in declared)
    }


def is_adapter_key(name: str) -> bool:
    """Whether a parameter or buffer belongs to an adapter and not to the base model."""
    return name.rsplit(".", 1)[-1].startswith(PREFIX)


def frozen_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model does not train, by name. Local."""
    trained = trained_in_full(model)
    return {
        name: param
        for name, param in model.named_parameters()
        if not (is_adapter_key(name) or name in trained or param.requires_grad)
    }


def trained_modules(model: nn.Module, config: DSEEConfig) -> list[str]:
    """Names of the modules that a config trains in full, with all modules inside them."""
    if not config.trained_modules:
        return []
    named = find_modules(model, config.trained_modules, what="trained module")
    return [
        name
        for name, _ in model.named_modules()
        if any(name == outer or name.startswith(outer + ".") for outer in named)
    ]


MOST_ENTRIES = 2**40


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_ENTRIES:
        raise ConfigError(f"{name}: {str(value)[:50]!r} is not a count")
    return value


def _shape(name: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(_count(name, each) for each in value)
    if not sizes or len(sizes) > 4 or not 0 < math.prod(sizes) < MOST_ENTRIES:
        raise ConfigError(f"{name}: {sizes[:5]} is not a shape")
    return sizes


def _pruned_record(name: str, values: Any) -> dict[str, Any]:
    """How one weight was pruned; whether `kept` is what the mask says is looked at where the mask is."""
    shape = _shape(name, values["shape"])
    if not 0 <= _count(name, values["kept"]) <= math.prod(shape):
        raise ConfigError(f"{name}: {values['kept']} kept of {math.prod(shape)}")
    if not isinstance(values.get("pattern", ""), str) or not isinstance(values.get("content", ""), str):
        raise ConfigError(f"{name}: pattern or content is not text")
    return {**values, "shape": shape}


def _sample(name: str, row: Any) -> list[float]:
    if len(row) != SAMPLED or not all(isinstance(x, float) for x in row):
        raise ConfigError(f"{name}: {str(row)[:50]} is no sample of {SAMPLED} floats")
    return list(row)


def _module_record(name: str, values: Mapping[str, Any]) -> AdapterSpec:
    known = {f.name for f in dataclasses.fields(AdapterSpec)}
    if not known - {"experts", "shared_a"} <= set(values) <= known:  # of version 0.1 they have neither
        raise ConfigError(f"module {name} has keys {sorted(values)}, expected {sorted(known)}")
    record = AdapterSpec(
        **{
            **values,
            "shape": _shape(name, values["shape"]),
            "slices": tuple((_count(name, start), _count(name, stop)) for start, stop in values["slices"]),
        }
    )
    wrong = type_problems(record)
    if wrong or len(record.shape) != 2 or not record.scaling > 0 or not 0 <= record.dropout < 1:
        raise ConfigError(f"module {name}: {'; '.join(wrong) or 'shape, scaling or dropout is invalid'}")
    edges = [0, *(edge for pair in record.slices for edge in pair), record.shape[0]]
    cut = record.experts and {stop - start for start, stop in record.slices} != {record.width}
    fits = (
        record.slices and edges == sorted(edges) and not cut and not (record.shared_a and not record.experts)
    )
    if not fits or record.rank < 1 or record.num_sparse < 0:
        raise ConfigError(
            f"module {name}: slices {record.slices} or sizes do not fit its shape {record.shape}"
        )
    return record


def check_model(record: AdapterRecord, model: nn.Module, where: str) -> None:
    """Refuse a model whose config or re-fit is not the one that a file was made with. Local.

    Raises:
        FormatError: naming what differs.
    """
    check_base(record.base, base_identity(model), where)
    check_refit(record, refit_mark(model), where)


def check_refit(record: AdapterRecord, found: str | None, where: str) -> None:
    """Compare the weights that a file was made for, by their `refit_mark`, with those of the base at hand. Local.

    Of a record that is re-fitted itself the contents tell, see `check_contents`.

    Raises:
        FormatError: another one; the message names the base to load.
    """
    if record.refitted or record.refit == found:
        return
    reason = (
        "belongs to a base whose weights were re-fitted, or have an update put in, and this one is another"
    )
    if record.refit is None:
        reason = (
            "was made for other weights than this base has, which holds an update already: by a re-fit, or because it "
            "was exported with the update put in"
        )
    raise FormatError(
        f"{where} {reason}: load {base_label(record.base)}, the base that it was made for (see base_of)"
    )


def check_state(values: dict[str, Any], where: Path) -> None:
    """Refuse a training state's record with keys that are missing or of the wrong type. Local.

    What an older one does not say is added: which parameters have state in the optimizer (`kept`), and what the numbers
    in it are (`scalars`).

    Raises:
        FormatError: naming the key.
    """
    types = {
        "parameters": dict,
        "moments": list,
        "steps": dict,
        "groups": list,
        "counters": dict,
        "extra": dict,
    }
    wrong = [key for key, kind in types.items() if not isinstance(values.get(key), kind)]
    if not wrong:
        _add_kept(values)
        counts = [values.get("world_size"), *map(values["counters"].get, COUNTERS)]
        counts += [*values["parameters"].values(), *values["steps"].values()]
        tests = {
            "a count": all(
                isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in counts
            ),
            "moments": all(isinstance(each, str) for each in values["moments"]),
            "groups": all(isinstance(each, dict) for each in values["groups"]),
            "scalars": isinstance(values["scalars"], dict),
        }
        tests["kept"] = tests["scalars"] and _are_kept(values)
        tests["world_size"] = tests["a count"] and 1 <= values["world_size"] <= MOST_RANKS
        wrong = [key for key, passed in tests.items() if not passed]
    if wrong:
        raise FormatError(
            f"{where} is damaged: key {wrong[0]!r} is missing or invalid; use another checkpoint"
        )


def _add_kept(values: dict[str, Any]) -> None:
    """Older states: what was counted has state, and so has all that SGD, Lion and others without a count trained."""
    counted = {name: {"step": n} for name, n in values["steps"].items() if n}
    values.setdefault("kept", counted or {name: {} for name in values["steps"] if values["moments"]})
    values.setdefault("scalars", {"step": "int"})


def _are_kept(values: dict[str, Any]) -> bool:
    """Whether `kept` names parameters, and numbers of which `scalars` says what they are."""
    try:
        for kind in values["scalars"].values():
            as_kept(0, kind)
        for name, numbers in values["kept"].items():
            values["parameters"][name]
            for key, number in numbers.items():
                as_kept(number, values["scalars"][key])
    except Exception:  # a number that is none, or too large for its kind
        return False
    return True
