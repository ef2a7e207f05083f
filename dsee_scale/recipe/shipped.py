"""Recipes and DeepSpeed configs that come with the package, found by name: `sentiment`, `zero3_bf16`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dsee_scale.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "shipped"
"""Links to the repository's `recipes/` and `ds_configs/`; in an installed package the files themselves."""
ENDINGS = {"recipes": ".yaml", "ds_configs": ".json"}


def shipped_names(kind: Literal["recipes", "ds_configs"]) -> list[str]:
    """What may be named."""
    return sorted(path.stem for path in (FOLDER / kind).glob(f"*{ENDINGS[kind]}"))


def find_file(kind: Literal["recipes", "ds_configs"], name: str | Path) -> Path:
    """A path as it is if there is such a file, else the shipped file of that name.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_names(kind)
    if str(name) in known:
        return FOLDER / kind / f"{name}{ENDINGS[kind]}"
    what = "recipe" if kind == "recipes" else "DeepSpeed config"
    raise ConfigError(
        f"{what} {name} is no file (in {Path.cwd()}) and none that is shipped: {', '.join(known)}"
    )
