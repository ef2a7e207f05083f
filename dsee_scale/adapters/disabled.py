"""The frozen model behind the adapters, for a while: a reference for DPO and GRPO that costs no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.partition import unwrap


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block adapted layers compute x W^T alone. Local, but enter it on every rank that runs the model.

    Before pruning that is the base model bit for bit. After pruning W has its zeros: the pruned base. After a re-fit
    W was solved together with the update and means nothing without it. For a reference model that is to stay the
    untouched base, compute its log-probabilities before pruning, or load it separately. Only forward passes change:
    what is saved, exported or pruned within the block is the model with its update.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it.

    Raises:
        TargetError: no adapter is in the model.
        ConfigError: modules are trained in full, so that the base's values are gone.
    """
    module = unwrap(model)
    layers: list[Any] = list(adapted_layers(module).values())
    if not layers:
        raise TargetError("the model has no adapters to disable; call dsee_scale.inject(model, config) first")
    config = model_state(module).config
    if config is not None and config.trained_modules:
        raise ConfigError(
            f"{', '.join(config.trained_modules)} are trained in full (trained_modules), and their original values "
            "are gone: adapt them as target_modules, or load the reference model separately"
        )
    before = [layer.dsee_disabled for layer in layers]
    try:
        for layer in layers:
            layer.dsee_disabled = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.dsee_disabled = was
