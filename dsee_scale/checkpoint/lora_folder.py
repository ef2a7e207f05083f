"""A stock PEFT LoRA folder as the start of tuning: its matrices become A and B, S2 starts empty or at zero."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.targets import find_targets
from dsee_scale.checkpoint.files import damaged, read_json
from dsee_scale.checkpoint.record import AdapterRecord, describe
from dsee_scale.checkpoint.tensors import TensorReader
from dsee_scale.config import DSEEConfig, SupportMethod
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import DSEEError, FormatError
from dsee_scale.partition import Partition
from dsee_scale.passes.decompose_model import decompose_model
from dsee_scale.passes.inject_model import apply_adapters, warn_of_random_weights
from dsee_scale.settings import regex_problems

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it was published."""
OTHER_METHODS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
)
"""Keys of adapter_config.json that mean more than W + s B A where they are set."""


@dataclass(frozen=True)
class LoraFolder:
    """What a PEFT folder says.

    Attributes:
        path: the folder.
        reader: its tensors.
        modules: adapted module's name -> its scaling.
        dropout: on the adapters' input.
    """

    path: Path
    reader: TensorReader
    modules: Mapping[str, float]
    dropout: float

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.reader.spec(_key(name, "A")).shape[0] for name in self.modules)


def is_lora_folder(folder: str | Path) -> bool:
    """Whether PEFT wrote it, and not `save_adapter`."""
    return (Path(folder) / CONFIG_NAME).is_file()


def open_lora(folder: str | Path) -> LoraFolder:
    """Read the settings and the names of the tensors. Local.

    Raises:
        FormatError: the folder is no plain LoRA; the message says why.
    """
    path = Path(folder)
    config = read_json(path / CONFIG_NAME)
    where = path / CONFIG_NAME
    _reject_other_methods(config, where)
    if not (path / WEIGHTS_NAME).is_file():
        raise FormatError(
            f"{path} holds no {WEIGHTS_NAME}; load it with PEFT and call save_pretrained to write one"
        )
    with damaged(where):
        return _read(path, config, where)


def _read(path: Path, config: Mapping[str, Any], where: Path) -> LoraFolder:
    reader = TensorReader([path / WEIGHTS_NAME])
    sides: dict[str, set[str]] = {}
    for name in reader.names():
        found = KEY.fullmatch(name)
        if found is None:
            raise FormatError(
                f"{path / WEIGHTS_NAME} holds {name}, which is not an A or B of a linear layer; merge that into the "
                "base with PEFT (merge_and_unload), and inject again"
            )
        sides.setdefault(found["module"], set()).add(found["side"])
    lone = [name for name, found_sides in sides.items() if len(found_sides) != 2]
    if lone or not sides:
        raise FormatError(f"{path / WEIGHTS_NAME} holds {'half of ' + lone[0] if lone else 'no tensor'}")
    modules = {name: _scaling(config, name, reader, where) for name in sides}
    return LoraFolder(path, reader, modules, float(config.get("lora_dropout") or 0.0))


def load_lora(
    partition: Partition,
    model: nn.Module,
    lora: LoraFolder,
    *,
    num_sparse: float | None,
    support: SupportMethod,
) -> AdapterRecord:
    """Collective. Adapt the modules of a PEFT folder with its values; the outputs are those that PEFT gives.

    Modules of a lower rank than the largest are filled up with ranks that start as `inject` makes them; where
    scalings differ, B takes the ratio.
    """
    with raise_on_all_ranks(partition):
        scaling = next(iter(lora.modules.values()))
        config = DSEEConfig(
            rank=lora.rank,
            alpha=scaling * lora.rank,
            num_sparse=num_sparse,
            support=support,
            target_modules=tuple(lora.modules),
            dropout=lora.dropout,
        )
        try:
            targets = find_targets(model, config, partition.shape)
        except DSEEError as error:
            raise FormatError(f"{lora.path} does not fit this model: {error}") from error
        for target in targets:
            _check_shapes(lora, target.name, target.shape)
            partition.writable(target.weight_name, target.weight)
        # All of it is read before anything changes.
        values = {name: _values(lora, name, own / scaling) for name, own in lora.modules.items()}
    supports = decompose_model(targets, config, partition)
    with raise_on_all_ranks(partition):
        apply_adapters(model, config, targets, supports, [], partition)
        warn_of_random_weights(model)
    layers: dict[str, Any] = adapted_layers(model)
    for name, (saved_a, saved_b) in values.items():
        flat = partition.gather([layers[name].dsee_flat])[0]
        a, b, _ = layers[name].dsee_spec.split(flat)
        a[: saved_a.shape[0]], b[:, : saved_a.shape[0]] = saved_a, saved_b
        partition.assign([layers[name].dsee_flat], [flat])
    return describe(partition, model, {})


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _check_shapes(lora: LoraFolder, name: str, shape: tuple[int, int]) -> None:
    rank = lora.reader.spec(_key(name, "A")).shape[0]
    lora.reader.expect(_key(name, "A"), (rank, shape[1]))
    lora.reader.expect(_key(name, "B"), (shape[0], rank))


def _values(lora: LoraFolder, name: str, ratio: float) -> tuple[Tensor, Tensor]:
    """A, and B times a ratio of scalings."""
    found = []
    for side, factor in (("A", 1.0), ("B", ratio)):
        value = lora.reader.read(_key(name, side))
        value = value if factor == 1 else value.float() * factor
        lora.reader.reject_not_finite(_key(name, side), value)
        found.append(value)
    return found[0], found[1]


def _reject_other_methods(config: Mapping[str, Any], where: Path) -> None:
    """Refuse what is more than W + s B A on the published W."""
    found = {key: config[key] for key in OTHER_METHODS if config.get(key)}
    if config.get("peft_type") != "LORA":
        found = {"peft_type": config.get("peft_type")}
    if config.get("bias") not in (None, "none"):
        found["bias"] = config["bias"]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        found["init_lora_weights"] = config["init_lora_weights"]
    if found:
        said = ", ".join(f"{key}={value!r}" for key, value in found.items())
        raise FormatError(
            f"{where} says {said}, expected a plain LoRA; merge it into its base with PEFT (merge_and_unload), save "
            "that, and inject again"
        )


def _scaling(config: Mapping[str, Any], name: str, reader: TensorReader, where: Path) -> float:
    """As PEFT reads it: the first pattern that fits the end of the name, else the value for all."""
    rank = reader.spec(_key(name, "A")).shape[0]
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        wrong = regex_problems("alpha_pattern", pattern)
        if wrong:
            raise FormatError(f"{where}: {wrong[0]}")
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not alpha > 0:
        raise FormatError(f"{where}: lora_alpha of {name} is {alpha!r}, expected a positive number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
