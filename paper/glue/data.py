"""GLUE's examples, from the hub or from local files of the same shape, as tokens with numbers for classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from dsee_scale.data.rows import read_file
from dsee_scale.errors import ConfigError
from paper.glue.arguments import DataArguments
from paper.glue.metrics import TASKS

GLUE = "nyu-mll/glue"
LABEL = "label"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class GlueData:
    """One run's examples.

    Attributes:
        task: GLUE task, or None.
        columns: the text column, or the two.
        classes: their names in the order of their numbers; empty for regression.
        regression: whether labels are numbers on a scale.
        parts: `train`, `validation`, `test`, and `validation_mm`, `test_mm` of MNLI, where asked for.
        sources: what each part is called in messages.
    """

    task: str | None
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    regression: bool
    parts: Mapping[str, Dataset]
    sources: Mapping[str, str] = field(default_factory=dict)


def load_glue(
    arguments: DataArguments, wanted: Sequence[str], saved_classes: Sequence[str] | None
) -> GlueData:
    """Read what is asked for. Local: every rank reads the same.

    Args:
        arguments: the data flags.
        wanted: some of `train`, `validation`, `test`.
        saved_classes: class names of a tuned model, for data whose training part is not read; None for none.

    Raises:
        ConfigError: no such data, a missing column or value, a class that is not known.
    """
    if arguments.train_file or arguments.validation_file or arguments.test_file:
        parts, sources = _local_parts(arguments, wanted)
    else:
        parts, sources = _hub_parts(arguments, wanted)
    columns = _text_columns(arguments.task_name, next(iter(parts.values())))
    for name, rows in parts.items():
        _check_columns(
            rows, columns, sources[name], arguments.task_name, labelled=not name.startswith("test")
        )
    regression, classes = _labels(arguments.task_name, parts, saved_classes)
    limits = {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_predict_samples,
    }
    parts = {name: _first(rows, limits[name.split("_")[0]]) for name, rows in parts.items()}
    return GlueData(arguments.task_name, columns, classes, regression, parts, sources)


def encode(
    data: GlueData, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], *, length: int, pad: bool
) -> dict[str, Dataset]:
    """Tokens, masks and `labels` of every part. Local.

    Args:
        data: the examples.
        tokenizer: the model's.
        classes: class names in the order of the model's numbers.
        length: tokens of an example at most.
        pad: fill every example to that length.
    """
    encoded = {}
    for name, rows in data.parts.items():

        def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in data.columns]
            padding = "max_length" if pad else False
            return dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True))  # type: ignore[arg-type]

        found = rows.map(tokens, batched=True, remove_columns=rows.column_names, desc="tokenize")
        if not name.startswith("test"):
            numbers = _numbering(data, rows, classes)
            found = found.add_column("labels", _label_numbers(rows, numbers, data, data.sources[name]))  # type: ignore[call-arg]
        encoded[name] = found
    return encoded


def _local_parts(
    arguments: DataArguments, wanted: Sequence[str]
) -> tuple[dict[str, Dataset], dict[str, str]]:
    parts, sources = {}, {}
    for name in wanted:
        path = getattr(arguments, f"{name}_file")
        parts[name], sources[name] = read_file(path), f"data file {path}"
    return parts, sources


def _hub_parts(arguments: DataArguments, wanted: Sequence[str]) -> tuple[dict[str, Dataset], dict[str, str]]:
    name, config = arguments.dataset_name or GLUE, arguments.dataset_config_name
    if arguments.dataset_name is None:
        config = arguments.task_name
    label = f"data set {name!r}" + (f" ({config})" if config else "")
    try:
        found: Any = load_dataset(name, config)
    except Exception as error:
        columns = ", ".join((*TASKS[arguments.task_name].columns, LABEL)) if arguments.task_name else "label"
        raise ConfigError(
            f"{label} does not load ({type(error).__name__}: {error}); where no hub is in reach give the same rows "
            f"as local CSV or JSON files with columns {columns}: --train_file TRAIN --validation_file DEV "
            "--test_file TEST, beside --task_name"
        ) from error
    splits = {part: part for part in wanted}
    if arguments.dataset_name is None and arguments.task_name == "mnli":
        splits = {"train": "train"} if "train" in wanted else {}
        for part in ("validation", "test"):
            if part in wanted:
                splits |= {part: f"{part}_matched", f"{part}_mm": f"{part}_mismatched"}
    missing = [split for split in splits.values() if split not in found]
    if missing:
        raise ConfigError(f"{label} has no split {missing[0]!r}; it has: {', '.join(found)}")
    sources = {part: f"{label}, split {split!r}" for part, split in splits.items()}
    return {part: found[split] for part, split in splits.items()}, sources


def _text_columns(task: str | None, rows: Dataset) -> tuple[str, ...]:
    if task is not None:
        return TASKS[task].columns
    others = [name for name in rows.column_names if name not in (LABEL, "idx")]
    if {"sentence1", "sentence2"} <= set(others):
        return ("sentence1", "sentence2")
    return tuple(others[:2])


def _check_columns(
    rows: Dataset, columns: Sequence[str], source: str, task: str | None, *, labelled: bool
) -> None:
    needed = (*columns, LABEL) if labelled else tuple(columns)
    missing = [name for name in needed if name not in rows.column_names]
    if missing or not columns:
        what = f"task {task!r}" if task else "a text column or two, and"
        raise ConfigError(
            f"{source} has no column {' and no column '.join(map(repr, missing or ['with text']))}; "
            f"columns found: {', '.join(rows.column_names)}; expected for {what}: {', '.join(needed)}"
        )
    if not len(rows):
        raise ConfigError(f"{source} has no rows")
    for name in needed:
        if any(value is None for value in rows[name]):
            raise ConfigError(f"{source}: column {name!r} has a row without a value")


def _labels(
    task: str | None, parts: Mapping[str, Dataset], saved: Sequence[str] | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether this is a regression, and the classes."""
    if task is not None:
        return not TASKS[task].classes, TASKS[task].classes
    source = parts.get("train", parts.get("validation"))
    if source is None:
        if saved is None:
            raise ConfigError(
                "predicting needs a tuned model: give its output folder as --model_name_or_path"
            )
        return not saved, tuple(saved)
    feature = source.features[LABEL]
    if isinstance(feature, ClassLabel):
        return False, tuple(feature.names)
    if str(getattr(feature, "dtype", "")).startswith("float"):
        return True, ()
    if "train" not in parts and saved:
        return False, tuple(saved)
    return False, tuple(map(str, sorted(set(source[LABEL]))))


def _numbering(data: GlueData, rows: Dataset, classes: Sequence[str]) -> dict[str, int]:
    """Class as it stands in the rows -> the model's number.

    A ClassLabel stands there as its place, whatever the names look like; a task's classes as names or places.
    """
    if data.regression:
        return {}
    number = {name: index for index, name in enumerate(classes)}
    by_place = {str(index): number[name] for index, name in enumerate(data.classes)}
    if isinstance(rows.features[LABEL], ClassLabel):
        return by_place
    return {**by_place, **number} if data.task else number


def _label_numbers(rows: Dataset, numbers: Mapping[str, int], data: GlueData, source: str) -> list[Any]:
    values: Iterable[Any] = rows[LABEL]
    if data.regression:
        return [float(value) for value in values]
    unknown = sorted({str(value) for value in values} - set(numbers))
    if unknown:
        raise ConfigError(
            f"{source}: column {LABEL!r} holds {', '.join(map(repr, unknown[:5]))}, which is no class; expected: "
            f"{', '.join(map(repr, data.classes))}"
        )
    return [numbers[str(value)] for value in values]


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))
