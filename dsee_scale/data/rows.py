"""Rows: from a hub dataset or local files to two checked tables, one to train on and one to evaluate on."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset

from dsee_scale.errors import ConfigError
from dsee_scale.recipe.sections import DataConfig

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # pandas would read sentences such as "NA" or "null" as missing values.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "line"}),
}


def template_columns(template: str) -> list[str]:
    """Columns that a template names in braces; `{{` and `}}` stand for the braces themselves."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"data: template {template!r}: {error}; write {{{{ for a brace itself") from error
    if any(not name.isidentifier() for name in names):
        raise ConfigError(f"data: template {template!r}: expected column names in braces, found {names}")
    return names


def required_columns(config: DataConfig) -> list[str]:
    """Columns that the task reads."""
    if config.task == "language_modelling":
        return [config.text_column]
    if config.task == "chat":
        return [config.messages_column]
    names = template_columns(config.prompt or "") + template_columns(config.completion or "")
    if config.task == "classification":
        names.append(config.label_column)
    return sorted(set(names))


def load_rows(config: DataConfig) -> tuple[Dataset, Dataset]:
    """The training and the validation rows, reduced to the columns that the task reads.

    Local: every rank reads the same files. Wrap it in `together` so that ranks fail together.

    Raises:
        ConfigError: a file that is missing or cannot be read, missing columns, no rows, a row without a
            value, a class that `labels` does not name.
    """
    train, validation = _hub_rows(config) if config.dataset is not None else _file_rows(config)
    if validation is None:
        if len(train) < 2:
            raise ConfigError(
                f"{_source(config, 'train')} has {len(train)} rows; expected at least 2 to split"
            )
        split = train.train_test_split(test_size=config.validation_fraction, seed=config.split_seed)
        train, validation = split["train"], split["test"]
    train = _checked(train, config, _source(config, "train"), config.max_train_samples)
    validation = _checked(validation, config, _source(config, "validation"), config.max_eval_samples)
    return train, validation


def _hub_rows(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    found = load_dataset(config.dataset, config.dataset_config)
    if not isinstance(found, DatasetDict):
        raise ConfigError(f"dataset {config.dataset!r} has no splits that can be read whole")
    for name in (config.train_split, config.validation_split):
        if name is not None and name not in found:
            raise ConfigError(f"dataset {config.dataset!r} has no split {name!r}; it has: {', '.join(found)}")
    return found[config.train_split], None if config.validation_split is None else found[
        config.validation_split
    ]


def _file_rows(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    assert config.train_file is not None
    validation = None if config.validation_file is None else read_file(config.validation_file)
    return read_file(config.train_file), validation


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Local. `datasets` counts its readers' uses on a server, and waits for it even where all files are here."""
    names = ("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    before = {name: getattr(datasets.config, name) for name in names if hasattr(datasets.config, name)}
    try:
        for name in before:
            setattr(datasets.config, name, name == "HF_HUB_OFFLINE")
        yield
    finally:
        for name, value in before.items():
            setattr(datasets.config, name, value)


def read_file(name: str) -> Dataset:
    """All rows of a local file.

    Raises:
        ConfigError: it is missing, empty, of an unknown ending, or cannot be read.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"data file {name} does not exist (working directory: {Path.cwd()})")
    if path.suffix.lower() not in READERS:
        raise ConfigError(f"data file {name}: ending {path.suffix!r} is unknown; valid: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise ConfigError(f"data file {name} is empty: it has no rows")
    reader, options = READERS[path.suffix.lower()]
    try:
        with without_network():
            return load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:
        cause = error.__cause__ or error
        if "no data" in str(cause):
            raise ConfigError(f"data file {name} has no rows") from error
        if isinstance(cause, OSError) and cause.filename and str(cause.filename) != str(path):
            raise ConfigError(
                f"data file {name}: the cache of datasets cannot be written ({cause.filename}: {cause.strerror}); set "
                "HF_HOME to a folder that can be"
            ) from error
        raise ConfigError(f"data file {name} cannot be read as {reader}: {cause}") from error


def _checked(rows: Dataset, config: DataConfig, source: str, limit: int | None) -> Dataset:
    wanted = required_columns(config)
    found = rows.column_names
    missing = [name for name in wanted if name not in found]
    if missing and rows.num_columns:
        raise ConfigError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}; "
            f"columns found: {', '.join(found)}; expected for task {config.task!r}: {', '.join(wanted)}"
        )
    if len(rows) == 0:
        raise ConfigError(f"{source} has no rows")
    rows = rows.select_columns(wanted)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=config.split_seed).select(range(limit))
    for name in wanted:
        _reject_missing_values(rows[name], name, source)
    if config.task == "classification":
        _reject_unknown_labels(rows[config.label_column], config, source)
    return rows


def _reject_missing_values(values: Iterable[Any], column: str, source: str) -> None:
    for index, value in enumerate(values):
        if value is None:
            raise ConfigError(f"{source}: column {column!r} has no value in row {index} (counted from 0)")


def _reject_unknown_labels(values: Iterable[Any], config: DataConfig, source: str) -> None:
    unknown = sorted({str(value) for value in values} - {str(key) for key in config.labels})
    if unknown:
        raise ConfigError(
            f"{source}: column {config.label_column!r} holds {', '.join(map(repr, unknown[:5]))}, "
            f"which data.labels does not name; it names: {', '.join(map(repr, config.labels))}"
        )


def _source(config: DataConfig, part: str) -> str:
    if config.dataset is not None:
        split = config.validation_split if part == "validation" else config.train_split
        return f"dataset {config.dataset!r} (split {split or config.train_split!r})"
    name = config.validation_file if part == "validation" else None
    return f"data file {name or config.train_file}"
