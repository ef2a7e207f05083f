"""The layers of design: imports point one way, no files in a circle, DeepSpeed's storage known in one place."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import dsee_scale

PACKAGE = Path(dsee_scale.__file__).parent
# A module imports from its own layer and from those before it. `__init__` and `__main__` stand at the top.
ORDER = [
    "version",
    "errors",
    "sigterm",
    "settings",
    "config",
    "pretrained",
    "random_state",
    "distributed",
    "scheduler_values",
    "algorithms",
    "partition",
    "adapters",
    "passes",
    "pruning",
    "checkpoint",
    "export",
    "recipe",
    "data",
    "evaluation",
    "planning",
    "training",
    "integrations",
    "cli",
    "__main__",
    "__init__",
]
IMPURE = ("torch.distributed", "torch.nn", "deepspeed", "logging", "os")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("dsee_scale", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def files() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 40
    return found


def imported(text: str) -> set[str]:
    """Every module that may be meant: `from a import b` names a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def graph() -> dict[str, set[str]]:
    """The files of the package that each of its files imports."""
    names = {module_name(path): imported(path.read_text()) for path in files()}
    # A folder's __init__ is not counted where one of the folder's files is meant.
    return {name: {m for m in found if m in names and m != name} for name, found in names.items()}


def test_every_module_has_a_layer():
    assert {layer(path) for path in files()} == set(ORDER)


def test_imports_point_one_way():
    for path in files():
        for module in imported(path.read_text()):
            parts = module.split(".")
            if parts[0] == "dsee_scale" and len(parts) > 1 and parts[1] in ORDER:
                assert ORDER.index(parts[1]) <= ORDER.index(layer(path)), f"{path} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def impurities(text: str) -> list[str]:
    return sorted(m for m in imported(text) if any(m == name or m.startswith(f"{name}.") for name in IMPURE))


def test_algorithms_are_pure():
    for path in files():
        if layer(path) == "algorithms":
            assert not impurities(path.read_text()), path


@pytest.mark.parametrize(
    "line",
    [
        "from torch import nn",
        "from torch import distributed as d",
        "import torch.nn.functional as F",
        "import os",
    ],
)
def test_an_impure_import_is_found_however_it_is_written(line):
    assert impurities(line)


def test_deepspeeds_storage_is_known_in_partition_alone():
    for path in files():
        if layer(path) not in ("partition", "training"):
            text = path.read_text()
            names = {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
            assert not {n for n in names if n.startswith("ds_")}, path
            assert not any(module.startswith("deepspeed") for module in imported(text)), path


def test_the_package_does_not_import_what_exists_to_repeat_the_paper():
    for path in files():
        assert not any(
            m.split(".")[0] in ("paper", "examples", "tests") for m in imported(path.read_text())
        ), path


def test_the_package_imports_neither_deepspeed_nor_a_device():
    code = (
        "import os; before = dict(os.environ); import dsee_scale, sys, torch; "
        "assert not {'deepspeed', 'accelerate', 'datasets', 'bitsandbytes', 'transformers'} & set(sys.modules); "
        "assert not torch.cuda.is_initialized(); assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_rank_relies_on_a_barrier():
    """Under NCCL a barrier holds the stream and not the host; what has to wait reads a collective's result."""
    assert not [path for path in files() if "barrier(" in path.read_text()]


def test_public_names_are_few_and_documented():
    assert len(dsee_scale.__all__) <= 14
    assert all(getattr(dsee_scale, name).__doc__ for name in dsee_scale.__all__ if not name.startswith("__"))


def test_what_is_imported_exists():
    """mypy passes over imports that it cannot find, ours among them."""
    missing = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (name := node.module or "").startswith("dsee_scale")
        if importlib.util.find_spec(name) is None
    }
    assert not missing


def test_what_scripts_import_exists():
    """mypy does not read these, and a run of each takes minutes."""
    root = PACKAGE.parent
    scripts = [
        path for folder in ("benchmarks", "examples", "launch") for path in (root / folder).rglob("*.py")
    ]
    assert len(scripts) > 15
    missing = {
        (str(path.relative_to(root)), node.module, alias.name)
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsee_scale")
        for alias in node.names
        if not hasattr(importlib.import_module(node.module), alias.name)
        and importlib.util.find_spec(f"{node.module}.{alias.name}") is None
    }
    assert not missing
