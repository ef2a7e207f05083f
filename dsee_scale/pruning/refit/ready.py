"""What a re-fit can do on a model at all, from its structure alone: known before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dsee_scale.errors import PartitionError, TargetError
from dsee_scale.partition import Partition
from dsee_scale.passes.batches import reject_encoder_decoder
from dsee_scale.passes.blocks import find_blocks
from dsee_scale.passes.pools import WeightPool


def ready_blocks(
    module: nn.Module, pools: Sequence[WeightPool], partition: Partition
) -> list[tuple[str, nn.Module]]:
    """The blocks that a re-fit goes through, name and module. Local, alike on all ranks.

    Raises:
        TargetError: quantised weights, several devices, or weights outside of one list of blocks.
        PartitionError: blocks that DeepSpeed fetches together.
    """
    members = {member.name: member for pool in pools for member in pool.members}
    for name, member in members.items():
        if id(member.param) in partition.codecs:
            raise TargetError(
                f"{name}.weight is quantised, and re-fitted values would have to be rounded to its codes again; set "
                "refit=False to prune by wanda alone, or load the base unquantised. Nothing was removed"
            )
    devices = {partition.compute_device(member.param) for member in members.values()}
    if len(devices) > 1:
        raise TargetError(
            f"the weights lie on several devices ({', '.join(sorted(map(str, devices)))}), and a re-fit runs all "
            "on one; load it without a device_map, or set refit=False. Nothing was removed"
        )
    reject_encoder_decoder(module)
    blocks = find_blocks(module, list(members))
    _reject_one_leaf(module, blocks)
    return blocks


def _reject_one_leaf(module: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Blocks that DeepSpeed fetches and releases together can't be run one after the other."""
    inside = {id(block) for _, block in blocks}
    for name, outer in module.named_modules():
        leaf = getattr(outer, "_z3_leaf", False) and id(outer) not in inside
        if leaf and not inside.isdisjoint(map(id, outer.modules())):
            raise PartitionError(
                f"ZeRO-3 fetches {name or 'the whole model'} as one leaf, by stage3_module_granularity_threshold or "
                "set_z3_leaf_modules, and a re-fit goes block after block; lower it, or set refit=False. Nothing was "
                "removed"
            )
