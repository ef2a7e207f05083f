"""The base that a re-fit leaves: frozen weights that no published model has, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dsee_scale.export.export import export_model
from dsee_scale.partition import unwrap

BASE_FOLDER = "base"


def save_base(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> None:
    """Collective. Write the frozen weights as a plain Hugging Face folder; adapters saved later name it as their base.

    Args:
        model: what `export_model` takes.
        folder: output folder; an earlier base in it is replaced.
        tokenizer: saved along.
    """
    export_model(model, folder, delta="none", tokenizer=tokenizer, overwrite=True)
    config: Any = getattr(unwrap(model), "config", None)
    if config is not None:
        config._name_or_path = str(folder)
