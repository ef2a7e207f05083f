"""The model as it is trained now, under stock names, one weight at a time: for engines that sample from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsee_scale.adapters.state import model_state, reject_broken
from dsee_scale.algorithms.delta import merged_weight
from dsee_scale.errors import TargetError
from dsee_scale.export.export import LiveModel
from dsee_scale.export.writer import masked_weights, trained_form
from dsee_scale.partition import open_partition, unwrap


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Collective: every rank must run through it. The weights with their updates, on rank 0; nothing elsewhere.

    They have the names and shapes that stock transformers, and so vLLM's `load_weights`, knows. Pruned matrices are
    (W + D) * M or W * M + D, whichever is trained. In TRL's GRPO with a vLLM server:

        trainer.vllm_generation._iter_named_params = lambda: merged_weights(trainer.model_wrapped)

    Extra memory: the adapters of 2 GB of weights; on rank 0 one weight besides.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it.

    Raises:
        TargetError: experts were removed.

    Yields:
        Name and whole weight, on the CPU where an update was put in. It may alias the model's own storage: read it.
    """
    module, partition = unwrap(model), open_partition(model)
    reject_broken(module)
    if any("experts" in how for how in model_state(module).pruned.values()):
        raise TargetError(
            "experts were removed from this model, and an engine that has all of them would still choose them; write "
            "the smaller model with export_model, and load that"
        )
    source = LiveModel(module, partition, "2GB", cut=False)
    masked = masked_weights(source.pruned)
    for entries in source.plan.files.values():
        pieces = source.read(entries, updates=True)
        for entry, piece in zip(entries, pieces, strict=True):
            if piece is None or partition.rank:
                continue
            weight, update = piece
            if update is not None:
                form = trained_form(source.pruned, entry.name)
                weight = merged_weight(weight, update, pruned=entry.name in masked, form=form)
            yield from source.stored(entry, weight).items()
