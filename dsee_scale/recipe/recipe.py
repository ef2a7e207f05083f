"""A recipe: everything that one run needs, from a YAML file and the command line."""

from __future__ import annotations

import copy
import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.pruning.schedule import GradualConfig
from dsee_scale.recipe.checks import argument_problems, check_best_metric, check_form, optimizer_problem
from dsee_scale.recipe.parsing import find_file, parse_command_line, read_yaml, set_nested
from dsee_scale.recipe.sections import (
    SCHEDULES,
    DataConfig,
    ExportConfig,
    ModelConfig,
    RetuneConfig,
)
from dsee_scale.settings import JsonConfig, not_finite, reject_unknown_keys, type_problem

PATHS = {
    "model": ("name", "tokenizer"),
    "data": ("dataset", "train_file", "validation_file"),
    "training": ("deepspeed", "output_dir"),
}
REFUSED_ARGUMENTS = {
    "auto_find_batch_size": "it starts the training loop again on a model that is already pruned",
    "fsdp": "weights are partitioned by DeepSpeed ZeRO here; use --deepspeed",
    "parallelism_config": "a run evaluates and calibrates on whole sequences, and ZeRO partitions its weights",
    "use_liger_kernel": "the loss is computed at the label positions only, which makes its fused loss idle",
    "push_to_hub": "checkpoints hold no base weights; export.push_to_hub: OWNER/NAME uploads the exported folder",
    "save_only_model": "a checkpoint without optimizer state cannot be resumed; save_adapter writes adapters",
    "do_predict": "a run has no test phase; evaluate the exported folder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run."""

    model: ModelConfig
    """The pretrained decoder."""
    data: DataConfig
    """Examples."""
    dsee: DSEEConfig = dataclasses.field(default_factory=DSEEConfig)
    """What is injected."""
    prune: tuple[PruneConfig, ...] = ()
    """What is set to zero between tune and retune: one pruning, or a list of them in order; null for none."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """TrainingArguments under their own names; max_steps or num_train_epochs is the tune phase."""
    retune: RetuneConfig | None = None
    """Training after pruning; null for none."""
    gradual: GradualConfig | None = None
    """Reaches the prune section's sparsity in several cuts; null for one cut."""
    export: ExportConfig | None = dataclasses.field(default_factory=ExportConfig)
    """The exported folder; null for none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `build_recipe` takes back."""
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            name: s.to_dict() if isinstance(s, JsonConfig) else copy.copy(s) for name, s in sections.items()
        }
        return plain | {"prune": [each.to_dict() for each in self.prune]}


OPTIONAL = ("retune", "gradual", "export")
SECTIONS: dict[str, type[JsonConfig]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "dsee": DSEEConfig,
    "prune": PruneConfig,
    "retune": RetuneConfig,
    "gradual": GradualConfig,
    "export": ExportConfig,
}


def load_recipe(
    path: str | Path, argv: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe file and apply command-line words to it.

    A relative input path that does not exist in the working directory is looked up beside the recipe.

    Args:
        path: YAML file, or the name of a shipped recipe; its key `base` names another file, which it changes.
        argv: `--section.key value`, `--key value` where the key is a TrainingArguments name or occurs in one
            section only, and `--resume [FOLDER]`.
        variables: values for `${NAME}` in paths.

    Raises:
        ConfigError: anything unknown, of the wrong type, or contradictory.
    """
    path = find_file("recipes", path)
    values = read_with_base(path)
    given: list[list[str]] = []
    for name, value in parse_command_line(argv):
        full = _full_name(name)
        if full in given:
            raise ConfigError(f"--{name} is given twice; give {'.'.join(full)} once")
        given.append(full)
        if len(full) > 1 and isinstance(values.get(full[0]), list):
            raise ConfigError(f"--{name}: section {full[0]!r} of {path} is a list; change it there")
        set_nested(values, full, value)
    _resolve_paths(values, path.parent, variables or {})
    return build_recipe(values)


def read_with_base(path: Path) -> dict[str, Any]:
    """A recipe's nested values: those of the file that its `base` names, changed key by key by its own.

    Raises:
        ConfigError: a file is missing or no recipe, or bases name each other in a circle.
    """
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    while True:
        if path in chain:
            raise ConfigError(f"recipe {chain[0]}: `base` leads back to {path}")
        chain.append(path)
        layers.append(read_yaml(path))
        named = layers[-1].pop("base", None)
        if named is None:
            break
        path = path.parent / str(named)
    values: dict[str, Any] = {}
    for own in reversed(layers):
        for name, section in own.items():
            both = isinstance(section, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **section} if both else section
    return values


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values, every section checked."""
    reject_unknown_keys(values, [f.name for f in dataclasses.fields(Recipe)], where="recipe")
    endless = [f"{path.removeprefix('.')} is {value}" for path, value in not_finite(values)]
    if endless:
        raise ConfigError(f"recipe: {'; '.join(endless)}: expected finite numbers")
    built: dict[str, Any] = {}
    for name, section in values.items():
        if name == "training":
            built[name] = _checked_training(section or {})
        elif name == "prune" and (section is None or isinstance(section, list)):
            built[name] = tuple(PruneConfig.from_dict(_settings(name, each)) for each in section or ())
        elif section is None and name in OPTIONAL:
            built[name] = None
        else:
            found = SECTIONS[name].from_dict(_settings(name, section))
            built[name] = (found,) if name == "prune" else found
    missing = [name for name in ("model", "data") if name not in built]
    if missing:
        raise ConfigError(f"recipe: section {' and '.join(map(repr, missing))} is missing")
    recipe = Recipe(**built)
    if recipe.retune is not None and not recipe.prune:
        raise ConfigError(
            "recipe: retune comes after prune; add a prune section, or lengthen training instead"
        )
    check_form(recipe.dsee, recipe.prune, recipe.export)
    check_best_metric(recipe.training.get("metric_for_best_model"), recipe.data)
    return recipe


def _settings(name: str, section: Any) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise ConfigError(f"recipe: section {name!r} holds {section!r}, expected settings below it")
    return section


def _checked_training(section: Mapping[str, Any]) -> dict[str, Any]:
    """TrainingArguments by their own names, with the types that they declare."""
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"recipe: section 'training' holds {section!r}, expected TrainingArguments below it"
        )
    hints = get_type_hints(TrainingArguments) | {"resume_from_checkpoint": str | bool | None}
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    reject_unknown_keys(section, names, where="training (TrainingArguments)")
    problems = [type_problem(name, value, hints[name]) for name, value in section.items()]
    for name, reason in REFUSED_ARGUMENTS.items():
        if section.get(name):
            problems.append(f"{name} is not possible here: {reason}")
    problems += argument_problems(section)
    problems.append(optimizer_problem(section.get("optim")))
    schedule = section.get("lr_scheduler_type", "linear")
    if schedule not in SCHEDULES:
        problems.append(
            f"lr_scheduler_type {schedule!r} has no form per phase; valid: {', '.join(SCHEDULES)}"
        )
    if any(problems):
        raise ConfigError("training: " + "; ".join(p for p in problems if p))
    return dict(section)


def _full_name(name: str) -> list[str]:
    """`learning_rate` -> training.learning_rate, `dsee.rank` -> itself, `rank` -> dsee.rank."""
    if name == "resume":
        return ["training", "resume_from_checkpoint"]
    path = name.split(".")
    if len(path) > 1 or name in (*SECTIONS, "training"):
        return path
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}:
        return ["training", name]
    homes = {s: [f.name for f in dataclasses.fields(c)] for s, c in SECTIONS.items()}  # type: ignore[arg-type]
    owners = [section for section, names in homes.items() if name in names]
    if len(owners) > 1:
        choices = ", ".join(f"--{section}.{name}" for section in owners)
        raise ConfigError(f"--{name} is ambiguous; write one of {choices}")
    if not owners:
        known = [f.name for f in dataclasses.fields(TrainingArguments)]
        known += [f"{section}.{key}" for section, keys in homes.items() for key in keys]
        known += [key for keys in homes.values() for key in keys]
        reject_unknown_keys({name: None}, known, where="command line")
    return [owners[0], name]


def _resolve_paths(values: dict[str, Any], folder: Path, variables: Mapping[str, str]) -> None:
    for section, names in PATHS.items():
        part = values.get(section)
        if not isinstance(part, dict):
            continue
        for name in names:
            value = part.get(name)
            if isinstance(value, str):
                value = string.Template(value).safe_substitute(variables)
                beside = folder / value
                lookup = name != "output_dir" and not Path(value).exists() and beside.exists()
                part[name] = str(beside) if lookup else value
