"""Whether a plain value fits a field's declared type, in words that a person can act on."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """A sentence if `value` is none of the types in `hint`, else None.

    Knows what settings use: int, float (whole numbers too), str, bool, enums by value, Literal, None, lists,
    tuples and mappings (their elements are not looked at), and unions of these. Other types pass.
    """
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(_fits(value, option) for option in options):
        return None
    expected = " or ".join(_in_words(option) for option in options if option is not type(None))
    return f"{name} must be {expected}, found {value!r}"


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
