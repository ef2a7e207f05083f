"""From labels in the data to the model's numbers."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from paper.glue.data import GlueData, _label_numbers, _numbering


def numbers(rows: Dataset, task: str | None, classes: list[str], order: list[str]) -> list[int]:
    """The labels of `rows` as a model with classes in that order has them."""
    data = GlueData(task, ("text",), tuple(classes), False, {"train": rows})
    return _label_numbers(rows, _numbering(data, rows, order), data, "rows")


def labelled(labels: list, feature=None) -> Dataset:
    features = feature and Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)


def test_a_class_label_is_a_place_even_where_names_look_like_numbers():
    stars = ["1", "2", "3", "4", "5"]
    rows = labelled([0, 1, 2, 3, 4], ClassLabel(names=stars))
    assert numbers(rows, None, stars, stars) == [0, 1, 2, 3, 4]
    assert numbers(rows, None, stars, stars[::-1]) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("labels", [["negative", "positive"], [0, 1]])
def test_a_tasks_classes_stand_there_as_names_or_numbers(labels):
    order = ["positive", "negative"]
    assert numbers(labelled(labels), "sst2", ["negative", "positive"], order) == [1, 0]


def test_numbers_without_a_task_are_names():
    assert numbers(labelled([1, 2, 1]), None, ["1", "2"], ["1", "2"]) == [0, 1, 0]
