"""Configs of models by folder or hub id: of sizes that somebody may mean, and soon where the hub cannot be reached."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsee_scale.errors import FormatError

MOST = {
    re.compile(r"(^n_layer|layers)$"): 1_000,
    re.compile(r"^(n|num)_(.*_)?experts$"): 10_000,
    re.compile(r"^num_labels$"): 1_000_000,
}
"""What takes time for each, also on the meta device: the largest number of it, by the key in a config."""
HUB_SECONDS = 3.0


def reject_endless(values: Mapping[str, Any], where: object) -> None:
    """Refuse a config that would take hours to build. Local.

    Raises:
        FormatError: naming the key.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            reject_endless(value, where)
        limit = next((most for name, most in MOST.items() if name.search(str(key))), None)
        if limit is not None and isinstance(value, (int, float)) and not value <= limit:
            raise FormatError(f"{where}: {key} is {str(value)[:30]}, expected at most {limit:,}")


def read_config(name: str | Path, **options: Any) -> Any:
    """transformers' config of a folder or hub id; code of its own runs only by `trust_remote_code`. Local.

    Raises:
        FormatError: sizes that nobody means.
        Exception: whatever transformers and the config's class raise.
    """
    from transformers import AutoConfig, PretrainedConfig

    options |= hub_options(name)
    code = options.pop("trust_remote_code", False)
    reject_endless(PretrainedConfig.get_config_dict(str(name), **options)[0], name)
    return AutoConfig.from_pretrained(str(name), trust_remote_code=code, **options)


def hub_options(name: str | Path) -> dict[str, Any]:
    """What `from_pretrained` is told besides, so that it doesn't try for a minute to reach a hub that is not there."""
    return {"local_files_only": True} if _is_out_of_reach(name) else {}


def hub_note(name: str | Path) -> str:
    """For messages about a model that was not found: where it was not looked for."""
    if not _is_out_of_reach(name):
        return ""
    return f" (the hub did not answer within {HUB_SECONDS:g} s, so only this machine's cache was looked at)"


def _is_out_of_reach(name: str | Path) -> bool:
    return not Path(name).exists() and not hub_is_reachable()


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers at all; asked once in a process. Local."""
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            if not constants.HF_HUB_OFFLINE:
                get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
                answered.set()
        except Exception:  # whatever the client in use raises
            return
        finally:
            done.set()

    # A name server that does not answer knows no timeout, hence the thread.
    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    done.wait(2 * HUB_SECONDS)
    return answered.is_set()
