"""A learning-rate scheduler's state as JSON can hold it, and back."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any
from weakref import WeakSet

from dsee_scale.distributed import log_rank0
from dsee_scale.errors import ConfigError

logger = logging.getLogger(__name__)

CALLABLES = ("lr_lambdas", "_scale_fn_custom")
"""Where PyTorch's schedulers put the attributes of callable objects in a state_dict, and None for functions."""
_TOLD: Any = WeakSet()
"""Schedulers that a warning was given for."""


def encoded(value: Any, name: str) -> Any:
    """JSON's own values as they are; what it would change (keys that are no text, tuples, infinity) with its type.

    Raises:
        ConfigError: one is of another kind.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, list):
        return [encoded(part, name) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [encoded(part, name) for part in value]}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[encoded(key, name), encoded(part, f"{name}.{key}")] for key, part in value.items()]}
    raise ConfigError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; expected numbers, text, lists and dicts: "
        "let the scheduler's state_dict leave it out"
    )


def decoded(value: Any) -> Any:
    """What `encoded` was given."""
    if isinstance(value, list):
        return [decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(decoded(part) for part in content)
    pairs = {decoded(key): decoded(part) for key, part in content}
    return Counter(pairs) if kind == "counter" else pairs


def scheduler_values(scheduler: Any) -> dict[str, Any] | None:
    """A scheduler's class and state. Local.

    What cannot be carried is told in a warning, once: of a callable object (as LambdaLR takes it) its own state is left
    out; where something else is no plain value, the whole is, as without a scheduler: None.
    """
    if scheduler is None:
        return None
    name, lost = type(scheduler).__name__, list[str]()
    try:
        state = encoded(
            _carried(scheduler.state_dict(), f"lr_scheduler {name}", lost), f"lr_scheduler {name}"
        )
    except ConfigError as error:
        _warn(scheduler, f"{error}. A resumed run begins the schedule anew")
        return None
    if lost:
        _warn(
            scheduler, f"{lost[0]}. A resumed run goes on at its step, with the callable object as it is then"
        )
    return {"class": name, "state": state}


def put_scheduler_values(scheduler: Any, saved: dict[str, Any] | None, older: dict[str, Any] | None) -> None:
    """Let a freshly made scheduler go on. Local.

    Args:
        scheduler: of the class that was saved; one of another class begins anew, with a warning.
        saved: what `scheduler_values` gave.
        older: of checkpoints from before that, its state as JSON makes it.
    """
    if saved is not None and saved["class"] == type(scheduler).__name__:
        scheduler.load_state_dict(decoded(saved["state"]))
    elif saved is not None:
        found = f"the checkpoint holds the state of lr_scheduler {saved['class']}"
        _warn(scheduler, f"{found}, not of {type(scheduler).__name__}, which begins anew")
    elif older:
        scheduler.load_state_dict(_counted(older))


def _warn(scheduler: Any, text: str) -> None:
    if scheduler not in _TOLD:
        _TOLD.add(scheduler)
        log_rank0(logger, "%s", text)


def _carried(value: Any, name: str, lost: list[str]) -> Any:
    """A state with None in place of callable objects' attributes that cannot be held; `lost` is told why."""
    if isinstance(value, list):
        return [_carried(part, name, lost) for part in value]
    if not isinstance(value, dict) or isinstance(value, Counter):
        return value
    found = {key: _carried(part, name, lost) for key, part in value.items() if key not in CALLABLES}
    for key in [key for key in CALLABLES if key in value]:
        part = value[key]
        rules = [_rule(each, f"{name}.{key}", lost) for each in (part if isinstance(part, list) else [part])]
        found[key] = rules if isinstance(part, list) else rules[0]
    return found


def _rule(attributes: Any, name: str, lost: list[str]) -> Any:
    try:
        encoded(attributes, name)
    except ConfigError as error:
        lost.append(str(error))
        return None
    return attributes


def _counted(state: Any) -> Any:
    """A state that was saved as it is, with the milestones' integers, which JSON had made text."""
    if isinstance(state, list):
        return [_counted(part) for part in state]
    if not isinstance(state, dict):
        return state
    return {
        key: Counter({int(at): count for at, count in part.items()})
        if key == "milestones" and isinstance(part, dict)
        else _counted(part)
        for key, part in state.items()
    }
