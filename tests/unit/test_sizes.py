"""What can be read at a sitting: files, folders and functions of the package have a largest size."""

from __future__ import annotations

import ast
from collections import Counter

from tests.unit.test_imports import PACKAGE, files

LINES, FUNCTION, FOLDER = 350, 60, 12


def test_files_and_functions_are_short():
    for path in files():
        text = path.read_text()
        assert text.count("\n") <= LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < FUNCTION, f"{path}: {node.name}"


def test_no_folder_holds_more_modules_than_one_remembers():
    found = Counter(path.parent for path in files() if path.name != "__init__.py")
    assert found[PACKAGE / "pruning"] > 5
    assert {folder.name: count for folder, count in found.items() if count > FOLDER} == {}
