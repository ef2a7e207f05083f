"""Adapters that are never trained are noticed where gradients are partitioned, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dsee_scale
from dsee_scale import DSEEConfig, TargetError
from dsee_scale.training.base_trainer import GradientWatch
from tests.dist.test_inject_prune import engine_for
from tests.models import partition, zero3_config


class LeavesOneOut(nn.Module):
    """Two layers of which one is never called."""

    def __init__(self, complete: bool) -> None:
        super().__init__()
        self.used, self.idle, self.complete = nn.Linear(8, 8), nn.Linear(8, 8), complete

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.used(x)
        return (self.idle(x) if self.complete else x).square().mean()


def first_step(stage: int, complete: bool) -> str:
    ds_config = zero3_config()
    ds_config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    model: Any = LeavesOneOut(complete)
    if stage == 3:
        partition(model, ds_config)
    config = DSEEConfig(rank=2, num_sparse=4, support="random", target_modules=("used", "idle"))
    dsee_scale.inject(model, config)
    engine = engine_for(model, ds_config)
    watch = GradientWatch(engine.module)
    engine.backward(engine(torch.ones(2, 8)))
    engine.step()
    if complete:
        watch.check()
        return ""
    with pytest.raises(TargetError) as caught:
        watch.check()
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_without_a_gradient_is_named_after_the_first_step(pools, stage):
    assert pools(2).run(first_step, stage, True) == ["", ""]
    assert all(
        "the adapter of idle got no gradient" in text for text in pools(2).run(first_step, stage, False)
    )
