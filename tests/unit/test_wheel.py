"""What `pip install` brings: built without a network, installed where nothing of the checkout can be found."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = """
import sys; sys.path.insert(0, {site!r})
import dsee_scale
from dsee_scale.recipe.recipe import load_recipe
from dsee_scale.recipe.parsing import find_file, shipped_names
assert dsee_scale.__file__.startswith({site!r}), dsee_scale.__file__
print(*shipped_names("recipes"), *shipped_names("ds_configs"))
recipe = load_recipe("sentiment")
assert find_file("ds_configs", recipe.training["deepspeed"]).is_file()
"""


def pip(*argv: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, argv)]
    subprocess.run(command, check=True, timeout=240)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's tracked files, links as links: building leaves its own files behind."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def check_installed(wheel: Path, site: Path, work: Path) -> None:
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")} == {"bin", "dsee_scale"}
    assert (site / "bin" / "dsee-scale").is_file()
    found = subprocess.run(
        [sys.executable, "-I", "-c", LOOK.format(site=str(site))],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    names = found.stdout.split()
    assert {p.stem for p in (ROOT / "recipes").glob("*.yaml")} <= set(names)
    assert {p.stem for p in (ROOT / "ds_configs").glob("*.json")} <= set(names)


def test_a_wheel_holds_the_package_with_recipes_and_configs(source, tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("dsee_scale-*.whl")
    check_installed(wheel, tmp_path / "site", tmp_path)


def test_an_sdist_builds_the_same_wheel(source, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=240)
    (archive,) = tmp_path.glob("dsee_scale-*.tar.gz")
    with tarfile.open(archive) as file:
        checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4
        file.extractall(tmp_path / "unpacked", **checked)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, unpacked)
    (wheel,) = tmp_path.glob("dsee_scale-*.whl")
    check_installed(wheel, tmp_path / "site", tmp_path)
