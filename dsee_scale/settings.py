"""What all settings share: frozen dataclasses, read strictly, whose mistakes are named together."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dsee_scale.errors import ConfigError

T = TypeVar("T", bound="JsonConfig")

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


class JsonConfig:
    """A frozen dataclass of plain values, checked when it is made, read from and written to JSON strictly.

    Values must have the types that the fields declare; what a class checks besides stands in `problems`.
    """

    def __post_init__(self) -> None:
        found = type_problems(self) or self.problems()
        if found:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(found)}")

    def problems(self) -> list[str]:
        """What is wrong with values of the right types, one sentence each."""
        return []

    def convert(self, name: str, how: Callable[[Any], Any]) -> None:
        """Set a field to what is made of its value; for `__post_init__`, before the checks."""
        value = getattr(self, name)
        try:
            object.__setattr__(self, name, how(value))
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{type(self).__name__}: {name} cannot be {value!r}") from error

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a plain mapping; an unknown key is an error that names the nearest valid one."""
        reject_unknown_keys(values, [f.name for f in dataclasses.fields(cls)], where=cls.__name__)  # type: ignore[arg-type]
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read a JSON file that `save` wrote, or one written by hand."""
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def reject_unknown_keys(found: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    """Raise ConfigError for keys that are not known, with the nearest valid name for each."""
    problems = unknown_keys(found, known)
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")


def unknown_keys(found: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """A sentence for each key that is not known."""
    return [
        f"unknown key {key!r}; {nearest(str(key), known) or 'valid keys: ' + ', '.join(known)}"
        for key in found
        if key not in known
    ]


def nearest(name: str, known: Sequence[str]) -> str:
    """A question that names the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def tuple_of_str(value: Any) -> Any:
    """Lists (from JSON or YAML) become tuples; a string stays one."""
    return value if isinstance(value, str) else tuple(value)


def at_least(config: Any, low: int, *names: str) -> list[str]:
    """A sentence for each field, None aside, that is below `low`."""
    return [
        f"{name} must be a whole number of at least {low}, found {value!r}"
        for name in names
        if (value := getattr(config, name)) is not None and value < low
    ]


def fraction(config: Any, *names: str) -> list[str]:
    """A sentence for each field, None aside, that does not lie in [0, 1)."""
    return [
        f"{name} must lie in [0, 1), found {value!r}"
        for name in names
        if (value := getattr(config, name)) is not None and not 0 <= value < 1
    ]


def type_problems(config: Any) -> list[str]:
    """A sentence for each field whose value has another type than it declares."""
    hints = get_type_hints(type(config))
    found = [type_problem(f.name, getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)]
    return [problem for problem in found if problem]


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """A sentence if `value` is none of the types in `hint`, else None.

    Knows what settings use: int, float (whole numbers too), str, bool, enums by value, Literal, None, lists,
    tuples and mappings (their elements are not looked at), and unions of these. Other types pass.
    """
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(_fits(value, option) for option in options):
        return None
    expected = [option for option in options if option is not type(None)]
    if get_origin(expected[0]) is Literal and isinstance(value, str):
        valid = [str(one) for one in get_args(expected[0])]
        return f"{name} {value!r} is unknown; {nearest(value, valid)} valid: {', '.join(valid)}".replace(
            ";  ", "; "
        )
    return f"{name} must be {' or '.join(map(_in_words, expected))}, found {value!r}"


def _fits(value: Any, option: Any) -> bool:
    origin = get_origin(option) or option
    if origin is Literal:
        return value in get_args(option)
    if option is type(None):
        return value is None
    if option is bool:
        return isinstance(value, bool)
    if option in (int, float):
        return isinstance(value, (int, option)) and not isinstance(value, bool)
    if option is str:
        return isinstance(value, str)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return isinstance(value, str) and value in [member.value for member in origin]
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def _in_words(option: Any) -> str:
    origin = get_origin(option) or option
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "one of " + ", ".join(member.value for member in origin)
    if origin in (list, tuple):
        return "a list"
    return WORDS.get(dict if origin is Mapping else option, str(option))
