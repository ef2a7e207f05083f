"""What an optimizer's state is carried over with, from one machine or engine to another."""

from __future__ import annotations

import torch

from dsee_scale.partition.engine_state import open_optimizer


def adamw(lr: float = 1e-3, **how: bool) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    """A layer with its optimizer after one step."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, **how)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def test_how_an_optimizer_computes_stays_as_the_run_has_it() -> None:
    """A fused AdamW wants its step counts on the GPU, a plain one on the host: neither may become the other."""
    saved = open_optimizer(*adamw(fused=True, lr=3e-4)).groups()
    layer, optimizer = adamw()
    assert open_optimizer(layer, optimizer).put_groups(
        [{**saved[0], "fused": True}]
    )  # as older checkpoints say
    assert not optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] == 3e-4
    assert not {"fused", "foreach", "capturable", "differentiable"} & saved[0].keys()
