"""Pools of 1, 2 and 3 DeepSpeed processes for the whole test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dist.extensions import build_extensions
from tests.dist.pool import WorkerPool
from tests.dist.run_inputs import write_inputs


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """`pools(world_size)` gives the running pool of that size."""
    running: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        return running.setdefault(world_size, WorkerPool(world_size))

    yield pool
    for each in running.values():
        each.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with its tokenizer and labelled sentences."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def extensions() -> None:
    """DeepSpeed's compiled operators, built once rather than by ranks that would wait for each other."""
    build_extensions()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/dist/" in str(item.path):
            item.add_marker(pytest.mark.dist)
