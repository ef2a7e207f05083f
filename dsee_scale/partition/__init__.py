"""How weights are stored, and how they are reached: `open_partition(model)` gives the right port."""

from __future__ import annotations

from torch import nn

from dsee_scale.errors import TargetError
from dsee_scale.partition.dense import DensePartition
from dsee_scale.partition.port import Exchange, Partition, Shard
from dsee_scale.partition.ranks import stored_dtype
from dsee_scale.partition.unknown_engines import reject_unknown_engines
from dsee_scale.partition.zero3 import Zero3Partition, is_partitioned, keep_experts_together

__all__ = [
    "Exchange",
    "Partition",
    "Shard",
    "is_engine",
    "keep_experts_together",
    "open_partition",
    "stored_dtype",
    "unwrap",
]

_WRAPPERS = {
    "_orig_mod": "compile it in place by its own .compile(), or the whole model by torch.compile(model)",
    "_checkpoint_wrapped_module": "use transformers' model.gradient_checkpointing_enable()",
}
"""What a wrapper calls the module within, and what to do without the wrapper."""


def open_partition(model: nn.Module) -> Partition:
    """The port to the weights of a raw model, a DeepSpeed engine, a DDP or an Accelerate-prepared model.

    Raises:
        PartitionError: the model is split in a way that is not known here.
        TargetError: a module in it is wrapped.
    """
    reject_unknown_engines(model)
    module = unwrap(model)
    _reject_wrapped(module)
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


def _reject_wrapped(model: nn.Module) -> None:
    """Raise TargetError for a module whose wrapper stands in the names of its weights. Local."""
    for name, module in model.named_modules():
        inner = next((each for each in _WRAPPERS if each in module._modules), None)
        if inner is not None:
            wrapper = "torch.compile" if inner == "_orig_mod" else f"torch's {type(module).__name__}"
            raise TargetError(
                f"{name or 'the model'} is wrapped by {wrapper}, whose {inner!r} would be part of the names of weights "
                f"in every record and file; expected the module itself: put the wrapper's .{inner} back in its place "
                f"and {_WRAPPERS[inner]}. Nothing was changed"
            )
