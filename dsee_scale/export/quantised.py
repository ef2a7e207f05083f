"""What an export says about a quantised base: what was merged, and how far that is from what was trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsee_scale.errors import TargetError
from dsee_scale.partition import Partition


def reject_unknown_quantisation(module: nn.Module, partition: Partition) -> None:
    """Refuse weights that are quantised by something else than bitsandbytes. Local."""
    for name, param in module.named_parameters():
        if not param.is_floating_point() and id(param) not in partition.codecs:
            raise TargetError(
                f"{name} is quantised ({type(param).__name__}, {param.dtype}), in a way that is not known here; "
                "expected floating-point weights or bitsandbytes: save the adapter, load the base unquantised, "
                "load_adapter, and export that"
            )


def decoded_base(partition: Partition) -> str | None:
    """What a quantised base is merged as."""
    kinds = {f"{c.kind}, decoded to {str(c.dtype).removeprefix('torch.')}" for c in partition.codecs.values()}
    return "; ".join(sorted(kinds)) or None


def distance_to(trained: Tensor, written: Tensor) -> float:
    """Relative Frobenius distance of two weights."""
    norm = torch.linalg.vector_norm(trained.float())
    return float(torch.linalg.vector_norm(written.float() - trained.float()) / norm) if norm else 0.0
