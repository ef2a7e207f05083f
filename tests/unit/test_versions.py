"""The lowest versions are the same in pyproject.toml, in what `make test-lowest` installs and in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict[str, str]:
    """Version of each package of a constraints file."""
    rows = [row.split(" ")[0].split("==") for row in (ROOT / file).read_text().splitlines() if "==" in row]
    return {canonicalize_name(name): version for name, version in rows}


def bounds() -> dict[str, str]:
    """Lower bound of each package that has one in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = sum(project["optional-dependencies"].values(), project["dependencies"])
    found = {}
    for requirement in map(Requirement, rows):
        for part in requirement.specifier:
            if part.operator == ">=":
                found[canonicalize_name(requirement.name)] = part.version
    return found


def test_the_lowest_set_is_the_bounds_of_the_package():
    lowest = pins("constraints-lowest.txt")
    both = {name: bound for name, bound in bounds().items() if name in lowest}
    assert {"torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "scipy"} <= set(both)
    assert {
        name: lowest[name] for name, bound in both.items() if not f"{lowest[name]}.".startswith(f"{bound}.")
    } == {}


def test_the_page_states_the_lowest_set_and_the_pinned_one():
    rows = re.findall(
        r"^\| ([a-z]+) \| ([\d.]+)[^|]* \| ([\d.]+) \|$", (ROOT / "docs/start.md").read_text(), re.M
    )
    assert len(rows) == 6
    lowest, pinned = bounds(), pins("constraints.txt")
    for name, low, tested in rows:
        assert low == lowest[name], name
        assert f"{pinned[name]}.".startswith(f"{tested}."), name
