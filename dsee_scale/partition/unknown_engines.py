"""Ways to split a model that are refused by name: taken for replicas, each rank would find a threshold of its own."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from dsee_scale.errors import PartitionError

WAY_OUT = "expected one process, DDP or ZeRO-1, 2 or 3 with whole layers"


def reject_unknown_engines(model: nn.Module) -> None:
    """Refuse FSDP, tensor, pipeline and expert parallelism. Local, by the types of modules and parameters.

    Raises:
        PartitionError: naming the first module or parameter, and the way out.
    """
    _reject_other_groups(model)
    for name, module in model.named_modules():
        found = _split_by(module)
        if found:
            raise PartitionError(
                f"{name or type(module).__name__} is {found}, which is not supported; {WAY_OUT}"
            )
    for name, param in model.named_parameters():
        if "DTensor" in {cls.__name__ for cls in type(param).__mro__}:
            raise PartitionError(
                f"{name} is a DTensor (FSDP2 or tensor parallelism), which is not supported; {WAY_OUT}: use "
                "DeepSpeed ZeRO-3 to split weights over processes"
            )


def _reject_other_groups(model: nn.Module) -> None:
    """Of an engine with model parallelism each rank's weights are others, and DDP may copy over a few ranks alone."""
    split = getattr(model, "mp_world_size", 1)
    if isinstance(split, int) and split > 1:
        raise PartitionError(
            f"the engine's `mpu` splits the model over {split} processes (tensor or pipeline parallelism), which is "
            f"not supported; {WAY_OUT}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        ranks, world = dist.get_world_size(model.process_group), dist.get_world_size()
        if ranks != world:
            raise PartitionError(
                f"DDP copies the model over {ranks} of {world} processes, which is not supported; {WAY_OUT}, over all "
                "processes"
            )


def _split_by(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        if cls.__name__ in ("PipelineEngine", "PipelineModule"):
            return "pipelined by DeepSpeed (each rank holds other layers): turn pipeline parallelism off"
        if cls.__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            return "split by FSDP: use DeepSpeed ZeRO-3 in its place"
        if cls.__module__.startswith("deepspeed.module_inject") and hasattr(module, "mp_group"):
            return 'split by DeepSpeed AutoTP: take "tensor_parallel" out of the DeepSpeed config'
        if cls.__module__.startswith("deepspeed.module_inject.auto_ep"):
            return 'spread over ranks by DeepSpeed AutoEP: take "expert_parallel" out of the DeepSpeed config'
        if cls.__module__.startswith("deepspeed.moe"):
            return "DeepSpeed's mixture-of-experts layer (each rank holds other experts): use the model's own"
    return None
