"""Recipe files and command-line words as plain nested values, before any of them is given a meaning."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from dsee_scale.errors import ConfigError


class RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, and a key given twice is an error.

    YAML 1.1, which PyYAML follows, wants a dot in a float and keeps the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ConfigError(f"line {node.start_mark.line + 1}: given twice: {', '.join(repeated)}")
        return super().construct_mapping(node, deep=deep)


RecipeLoader.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file as nested plain values.

    Raises:
        ConfigError: the file is missing, is not valid YAML, or is no mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds a {type(values).__name__}, expected sections such as 'model:'"
        )
    return values


def parse_value(text: str) -> Any:
    """One command-line word as the value that it would be in a recipe.

    Spaces around text are kept, and a template such as `{mr}` (to YAML a mapping without values) stays text.
    """
    try:
        value = yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and value == text.strip():
        return text
    template = isinstance(value, dict) and value and not any(part is not None for part in value.values())
    return text if template else value


def parse_command_line(argv: Sequence[str]) -> list[tuple[str, Any]]:
    """`--name value`, `--name=value`, `--name a b c` (a list) and `--name` (true) as (name, value) pairs.

    `-` and `_` are the same in a name. `--local_rank`, which launchers append, is dropped.
    """
    pairs: list[tuple[str, Any]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r} on the command line belongs to no setting; write --name value")
        name, equals, inline = word[2:].partition("=")
        values = [inline] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        name = name.replace("-", "_")
        if name == "local_rank":
            continue
        parsed = [parse_value(value) for value in values]
        pairs.append((name, True if not parsed else parsed[0] if len(parsed) == 1 else parsed))
    return pairs


def set_nested(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set `values[path[0]][path[1]]...`, making or replacing what is no mapping on the way."""
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def cache_folder() -> Path:
    """`$DSEE_SCALE_CACHE`, or `~/.cache/dsee_scale`. For entry points only: it reads the environment."""
    return Path(os.environ.get("DSEE_SCALE_CACHE") or Path.home() / ".cache" / "dsee_scale")


SHIPPED = Path(__file__).parents[1] / "shipped"
"""Links to the repository's `recipes/` and `ds_configs/`; in an installed package the files themselves."""
ENDINGS = {"recipes": ".yaml", "ds_configs": ".json"}


def shipped_names(kind: Literal["recipes", "ds_configs"]) -> list[str]:
    """What may be named."""
    return sorted(path.stem for path in (SHIPPED / kind).glob(f"*{ENDINGS[kind]}"))


def find_file(kind: Literal["recipes", "ds_configs"], name: str | Path) -> Path:
    """A path as it is if there is such a file, else the shipped file of that name.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_names(kind)
    if str(name) in known:
        return SHIPPED / kind / f"{name}{ENDINGS[kind]}"
    what = "recipe" if kind == "recipes" else "DeepSpeed config"
    raise ConfigError(
        f"{what} {name} is no file (in {Path.cwd()}) and none that is shipped: {', '.join(known)}"
    )
