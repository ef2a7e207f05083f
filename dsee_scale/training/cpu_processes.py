"""DeepSpeed's processes on machines without a GPU, which transformers does not start by itself.

With accelerate 1.15 and transformers 5.23, `use_cpu=True` keeps DeepSpeed away, and without it every CPU
process takes itself for the only one (no backend is chosen, so the world size stays 1). Making accelerate's
`PartialState` first, with the gloo backend named, gives both.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from dsee_scale.errors import ConfigError


def start_deepspeed_on_cpu(values: dict[str, Any]) -> None:
    """Collective. Start the process group and say so in TrainingArguments' `accelerator_config`.

    Args:
        values: arguments of TrainingArguments, changed in place.

    Raises:
        ConfigError: no launcher started this process.
    """
    assert not torch.cuda.is_available()
    if values.get("use_cpu"):
        raise ConfigError("training.use_cpu keeps DeepSpeed away; leave it out, or pass --deepspeed null")
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "training.deepspeed needs a launcher: start with deepspeed, accelerate launch or torchrun, "
            "or pass --deepspeed null to run in this one process"
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # type: ignore[no-untyped-call]
    with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo", timeout=timedelta(seconds=values.get("ddp_timeout", 1800)))
    own = values.get("accelerator_config") or {}
    if not isinstance(own, dict):
        raise ConfigError("training.accelerator_config must be written out in the recipe to run on the CPU")
    values["accelerator_config"] = {**own, "use_configured_state": True}
