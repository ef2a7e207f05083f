"""An adapter as the LoRA folder that stock PEFT, vLLM and others load: W * M + s (B A + S2), exactly.

S2 becomes ranks, see `algorithms.cover`. The frozen weights that it belongs to are named in `adapter_config.json`;
pruned ones are written beside it, in `base`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsee_scale.adapters.linear import weight_name
from dsee_scale.adapters.state import MASK_UPDATE, reject_broken
from dsee_scale.algorithms.cover import Cover, as_low_rank, smallest_cover
from dsee_scale.algorithms.delta import Delta
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.adapter_file import STEM as ADAPTER_STEM
from dsee_scale.checkpoint.contents import reject_input
from dsee_scale.checkpoint.folder import NewFolder, new_folder, open_folder
from dsee_scale.checkpoint.masks import STEM as MASKS
from dsee_scale.checkpoint.tensors import TensorSpec, TensorWriter, aligned, batches
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.export.adapter_source import AdapterSource, LiveAdapter, StoredAdapter
from dsee_scale.export.card import CARD_FILE, lora_card
from dsee_scale.export.export import BASE_FOLDER, LiveModel, reject_unknown_quantisation
from dsee_scale.export.from_files import StoredModel
from dsee_scale.export.writer import write_model
from dsee_scale.partition import open_partition, unwrap

KIND = "lora"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes (0.32)."""


@dataclass(frozen=True)
class LoraReport:
    """What `export_lora` wrote; printing it says how to load it.

    Attributes:
        folder: the LoRA folder.
        base: name or folder of the frozen weights that it belongs to.
        ranks: rank of each module in the files.
        rank: the largest one.
        served_rank: what vLLM's `--max-lora-rank` must be; None if it takes none so large.
        nbytes: size of the adapter's file.
    """

    folder: str
    base: str | None
    ranks: dict[str, int]
    rank: int
    served_rank: int | None
    nbytes: int

    @property
    def serving(self) -> str:
        """What vLLM must be told."""
        if self.served_rank is None:
            return f"vLLM serves rank {SERVED_RANKS[-1]} at most: train a lower rank or fewer sparse entries"
        return f"vLLM: --enable-lora --max-lora-rank {self.served_rank}"

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), self.rank
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        return (
            f"dsee_scale: exported a LoRA of {len(self.ranks)} modules, {ranks}, to {self.folder} "
            f"({self.nbytes / 1e6:,.1f} MB)\n"
            f"  base: {self.base or 'unnamed, give it when you load the adapter'}\n"
            f"  PEFT: PeftModel.from_pretrained(base, {self.folder!r}); {self.serving}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def export_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    uniform_rank: bool = False,
    base: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> LoraReport:
    """Collective. Write the adapter as a LoRA folder that stock PEFT and vLLM load, equal to what was trained.

    Adapters are gathered in batches of 64 MiB, no base weight is; where weights were pruned, the base with its zeros
    is written to `folder/base`, one weight at a time.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it. It is not changed.
        folder: output folder; parents are made.
        uniform_rank: pad every module with zeros to the largest rank, for programs with one scale for all (SGLang,
            llama.cpp).
        base: name or folder of the frozen weights, for `adapter_config.json`, where you have them already: no base
            is written then. None names the model's own, or what is written beside.
        tokenizer: saved with the base that is written.
        overwrite: replace an earlier export. A folder with other files in it is never replaced.
        progress: show a progress bar while a base is written; None: only on a terminal.

    Raises:
        TargetError: no module is adapted.
        ConfigError: what was trained is no LoRA on frozen weights: the update was trained under the mask, modules
            were trained in full, experts were removed, or the update would bring removed units back.
    """
    module, partition = unwrap(model), open_partition(model)
    reject_broken(module)
    with raise_on_all_ranks(partition):
        reject_unknown_quantisation(module, partition)
        source = LiveAdapter(module, partition)
        plan = LoraPlan(source, uniform_rank)
        if base is not None or not source.pruned:  # else it is written anew
            reject_input(Path(folder), (base, source.base.get("id")))
    with new_folder(partition, folder, kind=KIND, overwrite=overwrite) as new:
        if base is None and source.pruned:
            frozen = LiveModel(module, partition, "2GB", cut=False, tokenizer=tokenizer)
            write_model(frozen, new.partial / BASE_FOLDER, "none", overwrite=False, progress=progress)
            base = str(new.folder / BASE_FOLDER)
        return write_lora(plan, new, base or source.base.get("id"))


def export_lora_files(
    adapter: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> LoraReport:
    """The same from an adapter's files, in one process.

    Args:
        adapter: what `save_adapter` or `save_training_state` wrote.
        folder: output folder.
        base: folder of the base model, read where weights were pruned; None takes what the adapter names.
        uniform_rank: as in `export_lora`.
        overwrite: replace an earlier export.
        progress: as in `export_lora`.
    """
    reject_input(Path(folder), (adapter,))
    stored = open_folder(adapter, KINDS_WITH_ADAPTER)
    stored.verify(stored.names(ADAPTER_STEM) + stored.names(MASKS))
    source = StoredAdapter(stored)
    plan = LoraPlan(source, uniform_rank)
    base = str(base) if base else source.base.get("id")
    reject_input(Path(folder), (base,))
    with new_folder(source.partition, folder, kind=KIND, overwrite=overwrite) as new:
        if source.pruned:
            frozen = StoredModel(stored, base, cut=False)
            write_model(frozen, new.partial / BASE_FOLDER, "none", overwrite=False, progress=progress)
            base = str(new.folder / BASE_FOLDER)
        return write_lora(plan, new, base)


class LoraPlan:
    """Ranks of the modules, decided from the supports alone. Local, alike on every rank.

    Raises:
        TargetError: no module is adapted.
        ConfigError: what was trained is no LoRA on frozen weights.
    """

    def __init__(self, source: AdapterSource, uniform_rank: bool) -> None:
        reject_unlike_lora(source)
        self.source = source
        self.covers: dict[str, Cover] = {name: smallest_cover(*s) for name, s in source.supports.items()}
        needed = {name: spec.shapes[0][0] + self.covers[name].size for name, spec in source.specs.items()}
        self.rank = max(needed.values())
        self.ranks = dict.fromkeys(needed, self.rank) if uniform_rank else needed

    def specs(self, name: str) -> list[TensorSpec]:
        """A module's tensors in the file."""
        (outputs, inputs), rank = self.source.specs[name].shape, self.ranks[name]
        shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
        dtype = self.source.dtypes[name]
        return [TensorSpec(f"{PREFIX}{name}.{key}.weight", dtype, shape) for key, shape in shapes.items()]

    def config(self, base: str | None) -> dict[str, Any]:
        """`adapter_config.json`. Every module's alpha is its rank times s, so programs that read one scale agree."""
        specs = self.source.specs
        scaling = next(iter(specs.values())).scaling
        others = {name: rank for name, rank in self.ranks.items() if rank != self.rank}
        causal = str(self.source.base.get("class")).endswith(("ForCausalLM", "LMHeadModel"))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": _number(scaling * self.rank),
            "rank_pattern": others,
            "alpha_pattern": {name: _number(scaling * rank) for name, rank in others.items()},
            "target_modules": self._target_modules(),
            "fan_in_fan_out": any(spec.transposed for spec in specs.values()),
            "lora_dropout": next(iter(specs.values())).dropout,
            "bias": "none",
            "modules_to_save": None,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _target_modules(self) -> list[str]:
        """Suffixes where the settings name them, since servers look at these; else the modules' full names."""
        named = self.source.config.target_modules if self.source.config else ()
        plain = isinstance(named, tuple) and not any(c in name for name in named for c in "*?[")
        return sorted(named) if plain else list(self.source.specs)

    def factors(self, name: str, delta: Delta) -> tuple[Tensor, Tensor]:
        """A and B of one module as the file has them. Local.

        Raises:
            ConfigError: they would bring removed units back.
        """
        gone = self.source.gone.get(name)
        a, b = as_low_rank(delta, self.covers[name], rank=self.ranks[name])
        if gone is not None and bool((b[gone.to(b.device)] @ a).any()):
            raise ConfigError(
                f"the update of {name} is not zero where heads or neurons were removed, and would bring them back: "
                "use export_model(delta='masked')"
            )
        dtype = self.source.dtypes[name]
        return a.to(dtype), b.to(dtype)


def write_lora(plan: LoraPlan, new: NewFolder, base: str | None) -> LoraReport:
    """Collective. The files of a LoRA folder, batch by batch of modules."""
    source, partition = plan.source, plan.source.partition
    specs = aligned([spec for name in source.specs for spec in plan.specs(name)])
    writer: TensorWriter | None = None
    with raise_on_all_ranks(partition):
        if partition.rank == 0:
            new.write_json(CONFIG_NAME, plan.config(base))
            writer = TensorWriter(new, WEIGHTS_NAME, specs, {"format": "pt"})
    error: Exception | None = None
    for names in _module_batches(specs):
        deltas = source.read(names)
        try:
            for name, delta in zip(names, deltas, strict=True) if writer and error is None else ():
                for spec, factor in zip(plan.specs(name), plan.factors(name, delta), strict=True):
                    writer.write(spec.name, factor)  # type: ignore[union-attr]
        except Exception as caught:  # the other ranks go on to the next batch: follow, then fail together
            error = caught
    served = next((rank for rank in SERVED_RANKS if rank >= plan.rank), None)
    report = LoraReport(str(new.folder), base, plan.ranks, plan.rank, served, sum(s.nbytes for s in specs))
    card = lora_card(
        new.folder.name,
        base=base,
        tuned=source.config,
        rank=plan.rank,
        scope=report.serving,
        model_class=source.base.get("class"),
    )
    with raise_on_all_ranks(partition):
        if error is not None:
            raise error
        if writer is not None:
            writer.close()
            (new.partial / CARD_FILE).write_text(card, encoding="utf-8")
            new.adopt()
    return report


def reject_unlike_lora(source: AdapterSource) -> None:
    """Refuse what no W * M + D says. Local, alike on all ranks.

    Raises:
        TargetError: no module is adapted.
        ConfigError: naming what was trained otherwise, and the way out.
    """
    if not source.specs:
        raise TargetError("the model has no adapter, so there is no LoRA to write; use export_model")
    if source.trained:
        raise ConfigError(
            f"{source.trained[0]} and {len(source.trained) - 1} more parameters were trained in full "
            "(trained_modules), which a LoRA does not hold and servers do not load: use export_model"
        )
    experts = [name for name, spec in source.specs.items() if spec.experts]
    if experts:
        raise ConfigError(
            f"{experts[0]} and {len(experts) - 1} more are adapters on experts, which servers do not load beside their "
            "base; expected linear layers alone: use export_model, which merges them"
        )
    if any("experts" in how for how in source.pruned.values()):
        raise ConfigError(
            "experts were removed from this model, and the base of a LoRA has all of them, which stock routers would "
            "still choose: use export_model, which writes the smaller model with the update put in"
        )
    under = [
        n for n, spec in source.specs.items() if source.pruned.get(weight_name(n, spec), {}).get(MASK_UPDATE)
    ]
    if under:
        raise ConfigError(
            f"{under[0]} and {len(under) - 1} more were trained as (W + D) * M, which is not W + D with a low-rank D: "
            "use export_model(delta='masked'), which is the trained model exactly, or prune with "
            "PruneConfig(mask_update=False) to train the update beside the mask"
        )


def _module_batches(specs: Sequence[TensorSpec]) -> Iterator[list[str]]:
    """Module names in the order of the file, as many at once as are gathered together."""
    done: set[str] = set()
    for batch in batches(specs):
        names = [spec.name.removeprefix(PREFIX).rsplit(".", 2)[0] for spec in batch]
        fresh = [name for name in dict.fromkeys(names) if name not in done]
        done.update(fresh)
        if fresh:
            yield fresh


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
