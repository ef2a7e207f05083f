"""How weights are stored, and how they are reached: `open_partition(model)` gives the right port."""

from __future__ import annotations

from torch import nn

from dsee_scale.partition.dense import DensePartition
from dsee_scale.partition.port import Exchange, Partition, Shard
from dsee_scale.partition.unknown_engines import reject_unknown_engines
from dsee_scale.partition.zero3 import Zero3Partition, is_partitioned, keep_experts_together

__all__ = [
    "Exchange",
    "Partition",
    "Shard",
    "is_engine",
    "keep_experts_together",
    "open_partition",
    "unwrap",
]


def open_partition(model: nn.Module) -> Partition:
    """The port to the weights of a raw model, a DeepSpeed engine, a DDP or an Accelerate-prepared model.

    Raises:
        PartitionError: the model is split in a way that is not known here.
    """
    reject_unknown_engines(model)
    module = unwrap(model)
    if any(is_partitioned(param) for param in module.parameters()):
        return Zero3Partition(module)
    return DensePartition(module)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DeepSpeed's, DDP's or torch.compile's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif is_engine(model) or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def is_engine(model: nn.Module) -> bool:
    """Whether this is a DeepSpeed engine (told by its class's name, so that DeepSpeed stays optional)."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)
