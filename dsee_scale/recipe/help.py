"""The recipe's keys with their documentation, taken from the lines under the fields."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

from dsee_scale.recipe.recipe import SECTIONS


def recipe_help() -> str:
    """Every section and key of a recipe with its one line of documentation."""
    parts = ["recipe sections (beside training, which takes transformers' TrainingArguments):"]
    for section, cls in SECTIONS.items():
        parts.append(f"\n{section}:")
        for name, line in field_lines(cls).items():
            parts += textwrap.wrap(f"  --{section}.{name}  {line}", 100, subsequent_indent="        ")
    return "\n".join(parts)


def field_lines(cls: Any) -> dict[str, str]:
    """Field name -> the string that stands under it in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    lines = {}
    for field, text in itertools.pairwise(body):
        documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and documented:
            lines[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return lines
