"""DSEE for large decoders: tune through a low-rank update plus a sparse residual, prune, export."""

from typing import TYPE_CHECKING, Any

from dsee_scale.adapters.disabled import adapters_disabled
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.config import DecompositionConfig as DecompositionConfig
from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.config import Pool as Pool
from dsee_scale.errors import CalibrationError as CalibrationError
from dsee_scale.errors import ConfigError as ConfigError
from dsee_scale.errors import DSEEError as DSEEError
from dsee_scale.errors import FormatError as FormatError
from dsee_scale.errors import PartitionError as PartitionError
from dsee_scale.errors import TargetError as TargetError
from dsee_scale.export.export import base_of as base_of
from dsee_scale.export.export import export_model
from dsee_scale.export.load import load_pretrained
from dsee_scale.export.lora import export_lora as export_lora
from dsee_scale.partition.master_weights import keep_masters as keep_masters
from dsee_scale.passes.calibrate import Statistics as Statistics
from dsee_scale.passes.calibrate import calibrate
from dsee_scale.passes.inject_model import inject, trainable_parameters
from dsee_scale.pruning.prune import prune
from dsee_scale.pruning.schedule import CubicSchedule
from dsee_scale.version import __version__

if TYPE_CHECKING:
    from dsee_scale.integrations.trainer_callback import DSEECallback

__all__ = [
    "CubicSchedule",
    "DSEECallback",
    "DSEEConfig",
    "PruneConfig",
    "__version__",
    "adapters_disabled",
    "calibrate",
    "export_model",
    "inject",
    "load_adapter",
    "load_pretrained",
    "prune",
    "save_adapter",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    """`DSEECallback` when it is asked for: it needs the Trainer, whose import takes seconds."""
    if name != "DSEECallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsee_scale.integrations.trainer_callback import DSEECallback

    return DSEECallback
