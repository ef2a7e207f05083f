"""What all settings share: frozen dataclasses, read strictly, whose mistakes are named together."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dsee_scale.errors import ConfigError

T = TypeVar("T", bound="JsonConfig")

LARGEST = 1e18
"""Beyond it no setting makes sense, and libraries overflow in ways of their own."""
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
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
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


LONGEST_PATTERN = 1000
MOST_TIMES, MOST_WAYS, OPEN = 4, 1 << 16, 16
"""A repeat of more times is open and counts as 16 ways, so at most four of them."""


def regex_problems(name: str, pattern: str) -> list[str]:
    """What is wrong with a regular expression, time included: Python's has no limit, and some need 2^n steps."""
    if len(pattern) > LONGEST_PATTERN:
        return [
            f"{name} is a regular expression of {len(pattern)} characters, expected at most {LONGEST_PATTERN}"
        ]
    try:
        re.compile(pattern)
        # Its name until Python 3.10.
        parser: Any = getattr(re, "_parser", None) or importlib.import_module("sre_parse")
        ways = _ways(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{name} {pattern!r} is not a regular expression: {error}"]
    if ways > MOST_WAYS:
        return [
            f"{name} {pattern!r} may take for ever; expected at most four of '*' and '+', none of them over what can "
            "match in several ways, and few of '?', '{0,4}' and alternatives that begin alike"
        ]
    return []


def _ways(part: Any) -> int:
    """How often a parsed expression may be tried at one place of a name, at most; the product over what it holds."""
    ways = 1
    for code, argument in part:
        inner = [each for each in _flat(argument) if hasattr(each, "data")]
        counts = [_ways(each) for each in inner]
        if str(code).endswith("REPEAT"):
            low, high = argument[:2]
            if high > MOST_TIMES:
                ways *= OPEN if counts == [1] else MOST_WAYS + 1
            else:
                ways *= sum(counts[0] ** times for times in range(low, high + 1))
        elif str(code) == "BRANCH":
            ways *= max(counts) if _begin_apart(inner) else sum(counts)
        else:
            ways *= math.prod(counts)
        ways = min(ways, MOST_WAYS + 1)
    return ways


def _begin_apart(alternatives: Sequence[Any]) -> bool:
    """Whether the first character tells which alternative it is."""
    firsts: list[tuple[Any, Any]] = [each[0] if len(each) else ("", 0) for each in alternatives]
    if any(str(code) != "LITERAL" for code, _ in firsts):
        return False
    return len({chr(letter).casefold() for _, letter in firsts}) == len(firsts)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def type_problems(config: Any) -> list[str]:
    """A sentence for each field whose value has another type than it declares."""
    hints = get_type_hints(type(config))
    found = [type_problem(f.name, getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)]
    return [problem for problem in found if problem]


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """A sentence if `value` is none of the types in `hint`, else None.

    Knows what settings use: int, float (whole numbers too), str, bool, enums by value, Literal, None, lists,
    tuples and mappings, with the types of what they hold, and unions of these. Other types pass. A number that is not
    finite, wherever it stands, is none.
    """
    if where := next(not_finite(value), None):
        return f"{name}{where[0]} is {where[1]}, expected a finite number"
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
        return isinstance(value, (int, option)) and not isinstance(value, bool) and abs(value) < LARGEST
    if option is str:
        return isinstance(value, str)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return isinstance(value, str) and value in [member.value for member in origin]
    if origin in (list, tuple):
        inner = [each for each in get_args(option) if each is not Ellipsis] or [Any]
        return isinstance(value, (list, tuple)) and all(
            any(_fits_union(each, one) for one in inner) for each in value
        )
    if origin in (dict, Mapping):
        keys, values = get_args(option) or (Any, Any)
        return isinstance(value, Mapping) and all(
            _fits_union(key, keys) and _fits_union(each, values) for key, each in value.items()
        )
    return True


def _fits_union(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return any(_fits(value, option) for option in options)


def not_finite(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Where a nested value holds NaN or infinity, and which."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from not_finite(each, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from not_finite(each, f"{path}[{index}]")


def _in_words(option: Any) -> str:
    origin = get_origin(option) or option
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "one of " + ", ".join(member.value for member in origin)
    if origin in (list, tuple):
        inner = [each for each in get_args(option) if each in WORDS]
        return f"a list of {WORDS[inner[0]].removeprefix('a ')}" if inner else "a list"
    return WORDS.get(dict if origin is Mapping else option, str(option))
