"""Recipe files and command-line words as plain nested values, before any of them is given a meaning."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from dsee_scale.errors import ConfigError

LONGEST_FILE = 1 << 20
MOST_VALUES = 20_000
"""In a recipe, each `*alias` counted as all that it stands for."""
NULLS = ("null", "Null", "NULL", "~")
TEMPLATE = re.compile(r"\{[A-Za-z_]\w*\}")
"""A column's name in braces."""


class RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, a date and `2:4` are text, and a key given twice is an error.

    YAML 1.1, which PyYAML follows, wants a dot in a float, takes 2:4 for 124 seconds, and keeps the last of two equal
    keys. What aliases blow up is refused before it is made.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document, if it is of a sane size."""
        node: yaml.Node | None = super().get_single_node()
        sizes: dict[int, int] = {}
        if node is not None and _num_values(node, sizes) > MOST_VALUES:
            raise ConfigError(f"it holds more than {MOST_VALUES:,} values once its aliases are written out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different; `yes` and `no` are words there, say the names of classes."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ConfigError(f"line {node.start_mark.line + 1}: given twice: {', '.join(repeated)}")
        return super().construct_mapping(node, deep=deep)


def _num_values(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node; shared nodes are counted as often as they are named, and visited once."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES  # a node that holds itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        sizes[id(node)] = 1 + sum(_num_values(each, sizes) for each in flat)
    return sizes[id(node)]


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in ("timestamp", "int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file as nested plain values.

    Raises:
        ConfigError: the file is missing, is not valid YAML, or is no mapping.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(LONGEST_FILE + 1)
        if len(text) > LONGEST_FILE:
            raise ConfigError(f"it is longer than {LONGEST_FILE:,} bytes")
        values = yaml.load(text.decode("utf-8"), Loader=RecipeLoader)
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"recipe {path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"recipe {path}: {error}") from error
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds a {type(values).__name__}, expected sections such as 'model:'"
        )
    return values


def parse_value(text: str) -> Any:
    """One command-line word as the value that it would be in a recipe.

    Spaces around text are kept, and a template such as `{mr}` (to YAML a mapping without values) stays text. So does
    one within text, such as `Review: {mr}`, where YAML sees a mapping or a comment; not if it is quoted or in brackets.
    What is nothing to YAML is null if it says so, and else the text that it is: spaces, a new line, a `# heading`.
    """
    if TEMPLATE.search(text) and text.lstrip()[0] not in "{[\"'":
        return text
    try:
        value = yaml.load(text, Loader=RecipeLoader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    bare = text.strip()
    if (isinstance(value, str) and bare[:1] not in ("'", '"', "!")) or (value is None and bare not in NULLS):
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
        f"{what} {name} is not a file (in {Path.cwd()}) and not one that is shipped: {', '.join(known)}"
    )
