"""The GLUE tasks: their columns, their classes, their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dsee_scale.errors import ConfigError

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A GLUE task.

    Attributes:
        columns: the text column, or the two.
        classes: in the order of their numbers; empty for regression.
        metric: of (predictions, labels).
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metric: Metric


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float(_sklearn().accuracy_score(expected, predicted))}


def accuracy_and_f1(predicted: np.ndarray, expected: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Accuracy, and F1 of the positive class."""
    f1 = float(_sklearn().f1_score(expected, predicted, pos_label=positive, zero_division=0))
    return combined({**accuracy(predicted, expected), "f1": f1})


def matthews(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Matthews correlation."""
    return {"matthews_correlation": float(_sklearn().matthews_corrcoef(expected, predicted))}


def correlations(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation; 0 where one side is constant, for which there is none."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return combined({"pearson": 0.0, "spearmanr": 0.0})
    pearson, spearman = pearsonr(predicted, expected)[0], spearmanr(predicted, expected)[0]
    return combined({"pearson": float(pearson), "spearmanr": float(spearman)})


def mean_squared_error(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Mean of the squared differences."""
    return {"mse": float(_sklearn().mean_squared_error(expected, predicted))}


def combined(values: dict[str, float]) -> dict[str, float]:
    """The values and their mean, as GLUE reports tasks with two metrics."""
    return {**values, "combined_score": float(np.mean(list(values.values())))}


ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), matthews),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), accuracy),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), accuracy_and_f1),
    "qnli": Task(("question", "sentence"), ENTAILMENT, accuracy),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), accuracy_and_f1),
    "rte": Task(("sentence1", "sentence2"), ENTAILMENT, accuracy),
    "sst2": Task(("sentence",), ("negative", "positive"), accuracy),
    "stsb": Task(("sentence1", "sentence2"), (), correlations),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment"), accuracy),
}


def metric_of(task_name: str | None, *, regression: bool, positive: int = 1) -> Metric:
    """The metric of a task, or of data without one.

    Args:
        task_name: GLUE task, or None.
        regression: whether labels are numbers on a scale.
        positive: the model's number for the task's second class, whose F1 it is.
    """
    if task_name is not None:
        metric = TASKS[task_name].metric
        return partial(metric, positive=positive) if metric is accuracy_and_f1 else metric
    return mean_squared_error if regression else accuracy


def compute_metrics(metric: Metric, *, regression: bool) -> Callable[[Any], dict[str, float]]:
    """A function that the Trainer calls with (logits, labels)."""

    def compute(found: Any) -> dict[str, float]:
        return metric(decide(found.predictions, regression=regression), np.asarray(found.label_ids))

    return compute


def decide(logits: np.ndarray | Sequence[np.ndarray], *, regression: bool) -> np.ndarray:
    """Predicted values (N,) float, or classes (N,) int, from logits (N, C)."""
    first = np.asarray(logits[0] if isinstance(logits, (tuple, list)) else logits)
    return first.reshape(len(first)) if regression else first.argmax(axis=1)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigError("GLUE's metrics need scikit-learn: pip install 'dsee_scale[train]'") from error
    return metrics
