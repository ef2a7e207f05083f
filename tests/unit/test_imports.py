"""The layers of design: imports point one way, and DeepSpeed's storage is known in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dsee_scale

PACKAGE = Path(dsee_scale.__file__).parent
ORDER = [
    "errors",
    "config",
    "algorithms",
    "partition",
    "adapters",
    "passes",
    "checkpoint",
    "training",
    "glue",
    "cli",
]


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def files() -> list[Path]:
    found = [p for p in PACKAGE.rglob("*.py") if layer(p) in ORDER]
    assert len(found) > 10
    return found


def test_imports_point_one_way():
    for path in files():
        for module in imported(path):
            parts = module.split(".")
            if parts[0] == "dsee_scale" and len(parts) > 1 and parts[1] in ORDER:
                assert ORDER.index(parts[1]) <= ORDER.index(layer(path)), f"{path} imports {module}"


def test_algorithms_are_pure():
    for path in files():
        if layer(path) == "algorithms":
            for module in imported(path):
                assert not module.startswith(("torch.distributed", "deepspeed", "torch.nn", "logging", "os"))


def test_deepspeeds_storage_is_known_in_partition_alone():
    for path in files():
        if layer(path) not in ("partition", "training"):
            names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not {n for n in names if n.startswith("ds_")}, path
            assert not any(module.startswith("deepspeed") for module in imported(path)), path


def test_the_package_imports_neither_deepspeed_nor_a_device():
    code = (
        "import os; before = dict(os.environ); import dsee_scale, sys, torch; "
        "assert not {'deepspeed', 'accelerate', 'datasets', 'bitsandbytes'} & set(sys.modules); "
        "assert not torch.cuda.is_initialized(); assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_few_and_documented():
    assert len(dsee_scale.__all__) <= 14
    assert all(getattr(dsee_scale, name).__doc__ for name in dsee_scale.__all__ if not name.startswith("__"))
