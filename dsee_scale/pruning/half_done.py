"""What a pruning leaves that fails: the model as it was, or one that says what was written and is used no more."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from dsee_scale.adapters.state import model_state, reject_broken
from dsee_scale.config import PruneConfig
from dsee_scale.errors import PartitionError
from dsee_scale.partition import Partition


@contextlib.contextmanager
def whole_or_broken(
    module: nn.Module, partition: Partition, earlier: Sequence[PruneConfig] = ()
) -> Iterator[None]:
    """An error inside is raised as it is while no weight was written, else as one that says which were. Local.

    Args:
        module: what is pruned; after an error that came too late nothing goes on with it.
        partition: the port that all writing goes through.
        earlier: prunings of the same call, which are done.

    Raises:
        PartitionError: weights were written.
    """
    try:
        yield
    except BaseException as error:
        written = [name for name, param in module.named_parameters() if id(param) in partition.edited]
        if model_state(module).broken is not None or not (written or earlier):
            raise
        what = [f"the pruning of {config.pattern} is done" for config in earlier]
        if written:
            more = f" and {len(written) - 1} more, up to {written[-1]}," if written[1:] else ""
            what.append(f"{written[0]}{more} may be pruned, others are not")
        raise stopped(module, error, ", ".join(what)) from error


def stopped(module: nn.Module, error: BaseException, what: str) -> PartitionError:
    """The error for a model that is pruned in part, which is marked as unusable. Local."""
    reason = re.sub(r"[.;:,]? *Nothing was (removed|changed)\.?", "", str(error)) or type(error).__name__
    message = f"pruning stopped half way: {what} ({reason}). Load the model or the last checkpoint again"
    model_state(module).broken = message
    module.register_forward_pre_hook(lambda *_: reject_broken(module))
    return PartitionError(message)
