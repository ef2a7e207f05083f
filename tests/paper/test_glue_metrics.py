"""GLUE's metrics, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paper.glue.metrics import TASKS, decide, metric_of

PREDICTED, EXPECTED = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])


def test_each_task_has_glues_metrics():
    found = {name: set(metric_of(name, regression=name == "stsb")(PREDICTED, EXPECTED)) for name in TASKS}
    both = {"accuracy", "f1", "combined_score"}
    assert found.pop("cola") == {"matthews_correlation"}
    assert found.pop("stsb") == {"pearson", "spearmanr", "combined_score"}
    assert found.pop("mrpc") == found.pop("qqp") == both
    assert set(map(frozenset, found.values())) == {frozenset({"accuracy"})}
    assert set(found) == {"sst2", "rte", "qnli", "mnli", "wnli"}


def test_values_by_hand():
    # True positives 2, false positives 1, false negatives 1, true negatives 1.
    assert metric_of("mrpc", regression=False)(PREDICTED, EXPECTED) == pytest.approx(
        {"accuracy": 0.6, "f1": 2 / 3, "combined_score": (0.6 + 2 / 3) / 2}
    )
    expected = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert metric_of("cola", regression=False)(PREDICTED, EXPECTED)["matthews_correlation"] == pytest.approx(
        expected
    )
    x, y = np.array([0.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    found = metric_of("stsb", regression=True)(x, y)
    covariance = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert found["pearson"] == pytest.approx(covariance) and found["spearmanr"] == pytest.approx(0.8)
    assert found["combined_score"] == pytest.approx((covariance + 0.8) / 2)


def test_f1_is_of_the_positive_class_wherever_the_model_has_it():
    swapped = metric_of("mrpc", regression=False, positive=0)(1 - PREDICTED, 1 - EXPECTED)
    assert swapped == metric_of("mrpc", regression=False)(PREDICTED, EXPECTED)
    assert metric_of("cola", regression=False, positive=0)(PREDICTED, EXPECTED).keys() == {
        "matthews_correlation"
    }


def test_a_constant_prediction_correlates_with_nothing():
    assert metric_of("stsb", regression=True)(np.ones(4), np.arange(4.0))["combined_score"] == 0.0


def test_without_a_task_the_metric_follows_the_labels():
    assert metric_of(None, regression=False)(PREDICTED, EXPECTED) == {"accuracy": 0.6}
    assert metric_of(None, regression=True)(np.array([1.0, 3.0]), np.array([0.0, 0.0])) == {"mse": 5.0}


def test_logits_become_classes_or_values():
    logits = np.array([[0.1, 0.9], [2.0, -1.0]])
    assert decide(logits, regression=False).tolist() == [1, 0]
    assert decide((logits, None), regression=False).tolist() == [1, 0]
    assert decide(np.array([[0.5]]), regression=True).tolist() == [0.5]
