"""The rows of benchmarks/quality.py: ours, and peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _quality_lab import Lab, judged, trained_share
from _quality_report import UNTUNED
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import restore_under_mask
from dsee_scale.adapters.state import MASK_UPDATE, model_state
from dsee_scale.algorithms.refit import DAMPING
from dsee_scale.passes.pools import block_linears
from dsee_scale.pruning.refit import pieces
from dsee_scale.training.timeline import RETUNE_FACTOR

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, SCALE = 4, 8
Prunings = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Ours:
    """One of our rows.

    Attributes:
        prunings: arguments of `PruneConfig`, at one time.
        num_sparse: N.
        cuts: instead of one pruning, several ones, each with the steps of retune that follow.
        distilled: from how many of the tuned model's highest logits retune learns as well.
        late: whether tune and retune swap their numbers of steps.
        calibration: how often the job's number of calibration rows.
        matrices: names of the adapted ones.
        rank: theirs; alpha / rank is the same in all rows.
        factor: by which the schedule's rate is multiplied after the first pruning; it stays below its peak.
        warmup: share of the steps after a pruning over which the rate rises from zero once more.
        damping: of the Gram matrices, as a fraction of their mean diagonal.
        anew: whether the pruning takes all of the update into the weight, so that B restarts at zero, without moments.
    """

    prunings: Prunings = ()
    num_sparse: int | float | None = 64
    cuts: Sequence[tuple[Prunings, int]] = ()
    distilled: int = 0
    late: bool = False
    calibration: int = 1
    matrices: Sequence[str] = LINEARS
    rank: int = RANK
    factor: float = RETUNE_FACTOR
    warmup: float = 0.0
    damping: float = DAMPING
    anew: bool = False


HALF = {"sparsity": 0.5, "block_steps": 64}
TWO_OF_FOUR = {"pattern": "2:4", "block_steps": 96}
UNITS = [{"pattern": "heads", "num_per_layer": 3}, {"pattern": "neurons", "num_per_layer": 384}]
"""27% of the block weights."""
THREE_CUTS = [(0.25, 15), (0.375, 15), (0.5, 30)]
"""Sparsity, and the steps of retune after it."""
OURS = {
    "ours, 50%": Ours([HALF]),
    "ours, 2:4": Ours([TWO_OF_FOUR]),
    "ours, 2:4, twice the calibration rows": Ours([TWO_OF_FOUR], calibration=2),
    "ours, 50%, four times the calibration rows": Ours([HALF], calibration=4),
    "ours, 50%, pruned late": Ours([HALF], late=True),
    "ours, 2:4, pruned late": Ours([TWO_OF_FOUR], late=True),
    "ours, 60%": Ours([{"sparsity": 0.6, "block_steps": 64}]),
    "ours, 70%": Ours([{"sparsity": 0.7, "block_steps": 96}]),
    "ours, 50% without S2": Ours([HALF], num_sparse=None),
    "ours, 50%, N = 0.1%": Ours([HALF], num_sparse=0.001),
    "ours, 70%, every matrix alike": Ours([{"sparsity": 0.7, "block_steps": 96, "scope": "matrix"}]),
    "ours, 50%, without block steps": Ours([{"sparsity": 0.5}]),
    "ours, 2:4, without block steps": Ours([{"pattern": "2:4"}]),
    "ours, 50%, without block steps, query and value alone": Ours(
        [{"sparsity": 0.5}], matrices=("q_proj", "v_proj"), rank=21
    ),
    "ours, 50%, without block steps, rate times 1": Ours([{"sparsity": 0.5}], factor=1.0),
    "ours, 50%, without block steps, rate times 4": Ours([{"sparsity": 0.5}], factor=4.0),
    "ours, 50%, without block steps, warmed up again": Ours([{"sparsity": 0.5}], warmup=0.1),
    "ours, 50%, without block steps, update anew": Ours(
        [{"sparsity": 0.5, "mask_update": False}], warmup=0.1, anew=True
    ),
    "ours, 50%, without block steps, damping 1%": Ours([{"sparsity": 0.5}], damping=0.01),
    "ours, 50%, without block steps, distilled from 64 logits": Ours([{"sparsity": 0.5}], distilled=64),
    "ours, 50%, without block steps, in three cuts": Ours(
        cuts=[([{"sparsity": share}], steps) for share, steps in THREE_CUTS]
    ),
    "ours, 50%, wanda alone": Ours([{"sparsity": 0.5, "refit": False}]),
    "ours, a third of the heads, a quarter of the neurons": Ours(
        [{**each, "block_steps": 64} for each in UNITS]
    ),
    "ours, a third of the heads, a quarter of the neurons, not re-fitted": Ours(
        [{**each, "refit": False} for each in UNITS]
    ),
    "magnitude, 50%, in three cuts": Ours(
        cuts=[([{"sparsity": share, "score": "WABS", "refit": False}], steps) for share, steps in THREE_CUTS]
    ),
    "magnitude, 50%, update beside the mask": Ours([{"sparsity": 0.5, "score": "W", "mask_update": False}]),
}

AMOUNTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "50%": ({"sparsity": 0.5}, {"sparsity": 0.5}),
    "2:4": ({"pattern": "2:4"}, {"sparsity": 0.5, "mask_structure": "2:4"}),
    "60%": ({"sparsity": 0.6}, {"sparsity": 0.6}),
    "70%": ({"sparsity": 0.7}, {"sparsity": 0.7}),
}
"""What a peer removes: arguments of `PruneConfig`, and of llm-compressor's modifiers."""
DENSE = "dense LoRA"
RAISED = ", rate doubled as ours"
"""A peer's row in which the rate is multiplied as it is after our prune, from the same step on."""
OWL = {
    f"llm-compressor's SparseGPT then LoRA, {amount} by OWL": AMOUNTS[amount][1] for amount in ("60%", "70%")
}
WANDA = {f"wanda then LoRA, {amount}": settings for amount, (settings, _) in AMOUNTS.items()}
COMPRESSOR = {
    "llm-compressor's Wanda then LoRA, 50%": ("WandaPruningModifier", AMOUNTS["50%"][1]),
    **{
        f"llm-compressor's SparseGPT then LoRA, {amount}": ("SparseGPTModifier", settings)
        for amount, (_, settings) in AMOUNTS.items()
    },
    f"llm-compressor's SparseGPT then LoRA, 50%{RAISED}": ("SparseGPTModifier", AMOUNTS["50%"][1]),
    **{row: ("SparseGPTModifier", settings) for row, settings in OWL.items()},
}
PEERS = (UNTUNED, DENSE, DENSE + RAISED, *WANDA, *(COMPRESSOR if find_spec("llmcompressor") else ()))


def tuned_start(
    lab: Lab,
    seed: int,
    steps: int,
    num_sparse: int | float | None = 64,
    matrices: Sequence[str] = LINEARS,
    rank: int = RANK,
) -> tuple[nn.Module, Iterator[Any], Any]:
    """A seed's tuned model, kept in the output folder; the batches that follow, and the optimizer's moments."""
    some = "" if matrices == LINEARS else f"rank {rank} on {', '.join(matrices)}, "
    tuned = lab.output / "tuned" / f"{some}N={num_sparse}, {steps} steps, seed {seed}"
    model, source = lab.base(), lab.batches(seed)
    optimizer = tuned.with_name(f"{tuned.name}.pt")
    if optimizer.is_file():
        dsee_scale.load_adapter(model, tuned)
        for _ in range(steps):
            next(source)
        return model, source, torch.load(optimizer)
    config = DSEEConfig(
        rank=rank,
        alpha=SCALE * rank,
        num_sparse=num_sparse,
        target_modules=matrices,
        trained_modules=("*norm",) if lab.args.trained_norms else (),
        seed=seed,
    )
    dsee_scale.inject(model, config)
    moments = lab.train(model, source, steps)
    dsee_scale.save_adapter(model, tuned, overwrite=True)
    torch.save(moments, optimizer)
    return model, source, moments


def ours(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """Tune (or take the tuned start), prune, retune, export."""
    how = OURS[row]
    steps, more = (lab.args.steps, lab.args.retune_steps)[:: -1 if how.late else 1]
    model, source, moments = tuned_start(lab, seed, steps, how.num_sparse, how.matrices, how.rank)
    found = {"tuned": lab.quality(model), "trained_share": trained_share(model)}
    teacher = None
    if how.distilled:
        teacher, *_ = tuned_start(lab, seed, steps, how.num_sparse)
    calibration = lab.calibration(seed, how.calibration)
    for prunings, retune_steps in how.cuts or [(how.prunings, more)]:
        with patch.object(pieces, "DAMPING", how.damping):
            dsee_scale.prune(model, [PruneConfig(**each) for each in prunings], calibration)
        if how.anew:
            for pruned in model_state(model).pruned.values():
                pruned[MASK_UPDATE] = True
            restore_under_mask(model)
        found["pruned"] = lab.quality(model)
        moments = lab.train(
            model,
            source,
            retune_steps,
            done=steps,
            moments=None if how.anew else moments,
            teacher=teacher,
            top=how.distilled,
            factor=how.factor,
            warmup=how.warmup,
        )
        steps += retune_steps
    found["retuned"] = lab.quality(model)
    folder = lab.output / f"exported, {row}, seed {seed}"
    dsee_scale.export_model(model, folder, tokenizer=lab.tokenizer, overwrite=True)
    return found | judged(lab, folder)


def untuned(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """The model as it came, before anything."""
    return {"trained_share": 0.0} | judged(lab, Path(lab.args.model))


def dense_lora(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """PEFT, as many steps in all, nothing pruned."""
    return _peft(lab, lab.base(), row, seed, masked=False)


def pruned_then_lora(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """Prune the untuned model, tune it by PEFT with as many steps in all, merge under the mask."""
    model, batches = lab.base(), lab.calibration(seed)
    if row in COMPRESSOR:
        modifier, amount = COMPRESSOR[row]
        if row in OWL:
            amount = owl(model, batches, **amount)
        _compress(model, batches, modifier, amount)
    else:
        dsee_scale.prune(model, PruneConfig(**WANDA[row], refit=False), batches)
    return {"pruned": lab.quality(model)} | _peft(lab, model, row, seed, masked=True)


def owl(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    sparsity: float,
    factor: float = 5.0,
    reach: float = 0.08,
) -> dict[str, Any]:
    """A share for each block by its outliers, as OWL sets it (arXiv 2310.05175; the defaults are its authors').

    A block whose |W| * norm of the input channel has more entries above `factor` times their mean keeps more, by
    `reach` either way. llm-compressor 0.14's own OWL doesn't run, but its modifiers take one share for each block.
    """
    found = dsee_scale.calibrate(model, batches)
    blocks: dict[str, list[Tensor]] = {}
    for name, layer in block_linears(model).items():
        norms = found.norms(name)
        assert norms is not None
        blocks.setdefault(name.rsplit(".", 2)[0], []).append((layer.weight.detach().abs() * norms).flatten())
    parts = [torch.cat(each).float() for each in blocks.values()]
    outliers = torch.stack([(part > factor * part.mean()).float().mean() for part in parts])
    kept = 2 * reach * (outliers - outliers.min()) / (outliers.max() - outliers.min())
    shares = sparsity - (kept - kept.mean())
    return {"sparsity": shares.tolist(), "targets": [type(model.get_submodule(next(iter(blocks)))).__name__]}


def _compress(
    model: nn.Module, batches: list[dict[str, Tensor]], modifier: str, amount: dict[str, Any]
) -> None:
    """One modifier of llm-compressor on the block weights, from the same rows, one at a time so that none is padded."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    rows = [
        {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    settings = {"mask_structure": "0:0", "targets": ["Linear"], "ignore": ["re:.*lm_head"], **amount}
    loader, recipe = DataLoader(rows, batch_size=None), getattr(pruning, modifier)(**settings)  # type: ignore[arg-type]
    oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential", clear_sparse_session=True)


def _peft(lab: Lab, model: nn.Module, row: str, seed: int, *, masked: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    masks = {name: layer.weight != 0 for name, layer in block_linears(model).items()} if masked else {}
    lora = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, lora_dropout=0.0, target_modules=list(LINEARS))
    tuned = get_peft_model(model, lora)  # type: ignore[arg-type]
    for name, param in tuned.named_parameters():
        param.requires_grad_(param.requires_grad or (lab.args.trained_norms and "norm" in name))
    share = trained_share(tuned)
    source, done = lab.batches(seed), lab.args.steps if row.endswith(RAISED) else 0
    moments = lab.train(tuned, source, done) if done else None
    lab.train(tuned, source, lab.args.steps + lab.args.retune_steps - done, done=done, moments=moments)
    found: dict[str, Any] = {"retuned": lab.quality(tuned.base_model.model), "trained_share": share}
    merged = tuned.merge_and_unload()
    if masked:
        found["merged densely"] = lab.quality(merged)
        for name, keep in masks.items():
            merged.get_submodule(name).weight.data.mul_(keep)
    folder = lab.output / f"exported, {row}, seed {seed}"
    merged.save_pretrained(folder)
    return found | judged(lab, folder)
