"""The warning about adapters that ZeRO-3 would gather at every use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from dsee_scale.passes.inject_model import check_persistence
from tests.unit.test_linear import FUSED, IN, OUT, adapt, base_layer

NUMEL = 2 * 3 * IN + 8 * 3 + 2 * 5


def model():
    return nn.ModuleDict({"q_proj": adapt(base_layer(), FUSED), "other": base_layer()})


def zero(threshold=None, stage=3):
    settings = {"stage": stage}
    if threshold is not None:
        settings["stage3_param_persistence_threshold"] = threshold
    return {"zero_optimization": settings}


@pytest.mark.parametrize("config", [{}, zero(), zero(0, stage=2), zero(NUMEL)])
def test_adapters_within_the_threshold_need_no_warning(config):
    assert check_persistence(config, model()) is None


def test_the_warning_names_the_largest_adapter_and_the_threshold_that_it_needs():
    text = check_persistence(zero(NUMEL - 1), model())
    assert "the adapter of q_proj has" in text
    assert f"Set it to {NUMEL} or more" in text


def test_auto_counts_as_the_trainer_fills_it_in():
    injected = model()
    injected.config = SimpleNamespace(hidden_size=NUMEL // 10)
    assert "q_proj has" in check_persistence(zero("auto"), injected)
    injected.config.hidden_size = OUT * IN
    assert check_persistence(zero("auto"), injected) is None


def test_sizes_do_not_depend_on_what_a_rank_holds():
    partitioned = model()
    for param in partitioned.parameters():
        param.data = param.data.new_empty(0)
    assert f"Set it to {NUMEL} or more" in check_persistence(zero(1), partitioned)
