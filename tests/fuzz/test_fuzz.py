"""Damaged and hostile folders: refused by one of our errors, soon, with nothing changed, run, fetched or left behind.

`make fuzz` tries DSEE_SCALE_FUZZ of them, from number DSEE_SCALE_FUZZ_FIRST on; the usual run a few hundred, the same
ones each time.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from dsee_scale.errors import DSEEError
from tests.fuzz.folders import Readers, damage, make_folders

LOADS = int(os.environ.get("DSEE_SCALE_FUZZ", "300"))
FIRST = int(os.environ.get("DSEE_SCALE_FUZZ_FIRST", "0"))
LONGEST = 30.0
pytestmark = pytest.mark.timeout(max(300, LOADS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("whole"))


def test_whole_folders_are_read(folders):
    for kind, folder in folders.items():
        for number in range(6):
            Readers(folders).read(kind, folder, random.Random(number))


def try_damaged(
    folders: dict[str, Path], work: Path, numbers: Iterable[int]
) -> tuple[dict[str, int], list[str]]:
    """Damage and read a folder for each number; how it went, and what should not have happened."""
    counts = dict.fromkeys(
        ("refused", "read", "uncaught", "hung", "changed", "left behind", "executed", "network"), 0
    )
    examples: list[str] = []

    def count(what: str, example: str) -> None:
        counts[what] += 1
        if what not in ("refused", "read"):
            examples.append(f"{what}: {example}")

    readers = Readers(folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: count("network", "connect"))
        patch.setattr(subprocess, "Popen", lambda *a, **_: count("executed", str(a)))
        patch.setattr(os, "system", lambda *a: count("executed", str(a)))
        for number in numbers:
            rng = random.Random(number)
            kind = rng.choice(sorted(folders))
            copy = work / "copy"
            shutil.copytree(folders[kind], copy)
            what = f"{number}, {kind}, {'; '.join(damage(copy, rng) for _ in range(rng.choice((1, 1, 2))))}"
            started = time.monotonic()
            changed = False
            try:
                changed = readers.read(kind, copy, rng)
                count("read", what)
            except DSEEError:
                count("refused", what)
            except BaseException as error:
                count("uncaught", f"{what}: {type(error).__name__}: {str(error)[:200]}")
            if time.monotonic() - started > LONGEST:
                count("hung", what)
            if changed:
                readers.renew()
            elif not readers.is_untouched():
                count("changed", what)
                readers.renew()
            shutil.rmtree(copy)
            if list(work.iterdir()):
                count("left behind", what)
                shutil.rmtree(work)
                work.mkdir()
    return counts, examples


def test_damaged_folders(folders, tmp_path):
    counts, examples = try_damaged(folders, tmp_path, range(FIRST, FIRST + LOADS))
    print(counts)
    assert not examples, "\n".join([str(counts), *examples[:40]])
    assert counts["refused"] > LOADS / 3
