"""ms-swift: a tuner and a callback by which `swift sft` tunes, prunes and retunes.

A plugin of yours says what (`my_plugin.py`):

    from dsee_scale import DSEEConfig, PruneConfig
    from dsee_scale.integrations.ms_swift import register

    register(DSEEConfig(rank=16, alpha=32), prune=PruneConfig(sparsity=0.5), at=0.3)

and `swift sft --external_plugins my_plugin.py --tuner_type dsee --callbacks dsee ...` runs it. What lora_rank and its
like say is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dsee_scale.checkpoint.adapter import load_adapter
from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.integrations.trainer_callback import DSEECallback
from dsee_scale.passes.inject_model import inject
from dsee_scale.pruning.schedule import CubicSchedule

NAME = "dsee"


def register(
    config: DSEEConfig,
    *,
    prune: PruneConfig | Sequence[PruneConfig] | None = None,
    at: float | CubicSchedule | None = None,
) -> None:
    """Make `--tuner_type dsee` and `--callbacks dsee` known to ms-swift; give both.

    Args:
        config: of the adapters.
        prune: as in `DSEECallback`.
        at: as in `DSEECallback`.

    Raises:
        ConfigError: ms-swift is missing, or the settings make no sense.
    """
    try:
        from swift.callbacks import callbacks_map
        from swift.tuner_plugin import Tuner, tuners_map
    except ImportError as error:
        raise ConfigError(f"this plugin needs ms-swift 4: pip install ms-swift ({error})") from error
    DSEECallback(prune, at)  # settings that make no sense are refused before a model is loaded

    class DSEETuner(Tuner):
        """Adapters in place; the callback saves them."""

        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> nn.Module:
            """Collective. Put adapters into the model."""
            inject(model, config)
            return model

        @staticmethod
        def from_pretrained(model: nn.Module, model_id: str, **_: Any) -> nn.Module:
            """Collective. Load adapters and masks of a checkpoint."""
            load_adapter(model, model_id)
            return model

        @staticmethod
        def save_pretrained(*_: Any, **__: Any) -> None:
            """Every rank has a part of an adapter, and ms-swift asks one of them."""
            raise ConfigError(f"--callbacks {NAME} is missing: it saves what --tuner_type {NAME} trains")

    tuners_map[NAME] = DSEETuner
    callbacks_map[NAME] = lambda args, trainer: DSEECallback(prune, at)
