"""Export a live model: a raw one, a DeepSpeed engine, or what Accelerate or DDP made of it."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.linear import adapted_layers, delta_record, weight_name
from dsee_scale.adapters.state import model_state, reject_unusable, warn_of_loaded_zeros
from dsee_scale.algorithms.delta import Delta, merged_weight
from dsee_scale.checkpoint.adapter import write_adapter
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.contents import reject_input
from dsee_scale.checkpoint.folder import NewFolder, open_folder
from dsee_scale.checkpoint.identity import REFIT, merged_mark, refit_mark
from dsee_scale.checkpoint.record import AdapterRecord, trained_in_full
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import FormatError, TargetError
from dsee_scale.export.plan import Entry, plan_export, reverted, saved_state
from dsee_scale.export.report import ExportReport
from dsee_scale.export.structure import as_loaded, find_structure, smaller_config
from dsee_scale.export.writer import (
    WITHOUT_UPDATE,
    DeltaForm,
    check_delta,
    masked_weights,
    trained_form,
    write_model,
)
from dsee_scale.partition import Partition, open_partition, stored_dtype, unwrap
from dsee_scale.partition.quantized import holds_numbers

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
BASE_FOLDER = "base"
"""Where a run keeps the frozen weights that a re-fit leaves."""


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    delta: DeltaForm = "masked",
    tokenizer: Any = None,
    max_shard_size: int | str = "2GB",
    overwrite: bool = False,
    progress: bool | None = None,
    notes: str = "",
    pictures: Mapping[str, bytes] | None = None,
) -> ExportReport:
    """Collective. Write the whole model, streaming one weight at a time to rank 0, which writes the files.

    Extra memory: the adapters of one weight file; on rank 0 one weight besides, and a block in float32.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it. It is not changed.
        folder: output folder; parents are made.
        delta: `masked` writes (W + D) * M, as sparse as `prune` made W; `dense` writes W * M + D; both are plain models
            that stock transformers loads. `separate` writes W * M, with the adapter in `folder/adapter`;
            `none` writes W * M alone, the base that adapters belong to after `refit`. Removed heads and neurons are
            cut out of the files of the first two; of the others they stay as zeros.
        tokenizer: saved along (or a processor); anything with `save_pretrained`.
        max_shard_size: size of a weight file at most, unless one weight is larger.
        overwrite: replace an earlier export. A folder with other files in it, or with changed ones, is never replaced.
        progress: show a progress bar on rank 0; None: only on a terminal.
        notes: Markdown for the model card (`README.md`), such as what was measured.
        pictures: files that the notes show, by name.

    Returns:
        Sizes and sparsity, the same on every rank.

    Raises:
        ConfigError: the folder is not empty, a setting is unknown, or `dense` was asked of matrices that were
            trained under their mask.
        TargetError: the base is quantised by something else than bitsandbytes.
        FormatError: writing failed, e.g. no space is left; what was there before stays.
    """
    module, partition = unwrap(model), open_partition(model)
    reject_unusable(module)
    with raise_on_all_ranks(partition):
        check_delta(delta)
        if (
            delta != "none"
        ):  # the weights of a new base were read long ago, and its old folder is no one else's
            reject_input(Path(folder), [getattr(getattr(module, "config", None), "_name_or_path", None)])
        reject_unknown_quantisation(module, partition)
        source = LiveModel(
            module, partition, max_shard_size, cut=delta not in WITHOUT_UPDATE, tokenizer=tokenizer
        )
    report = write_model(
        source, folder, delta, overwrite=overwrite, progress=progress, notes=notes, pictures=pictures
    )
    if partition.rank == 0:
        logger.info("%s", report)
    return report


class LiveModel:
    """A model in memory, wherever its weights are, as the source of an export."""

    def __init__(
        self,
        module: Any,
        partition: Partition,
        max_shard_size: int | str,
        *,
        cut: bool,
        tokenizer: Any = None,
    ) -> None:
        self.module, self.partition, self.tokenizer, self.cut = module, partition, tokenizer, cut
        warn_of_loaded_zeros(module)
        self.pruned: Mapping[str, Mapping[str, Any]] = model_state(module).pruned
        self.tuned = model_state(module).config
        self.base_id: str | None = getattr(getattr(module, "config", None), "_name_or_path", None) or None
        self.structure = find_structure(module, partition.shape) if cut else as_loaded(module)
        smaller, self.reason = None, None
        if self.structure is not None:
            smaller, self.reason = smaller_config(module, self.structure, partition.shape)
        self.config: Any = smaller or getattr(module, "config", None)
        self.plan = plan_export(partition, module, max_shard_size, self.structure)
        kinds = {
            f"{c.kind}, decoded to {str(c.dtype).removeprefix('torch.')}" for c in partition.codecs.values()
        }
        self.base = "; ".join(sorted(kinds)) or None
        self.as_trained: Callable[[Tensor], Tensor] | None = None
        if partition.codecs:
            self.as_trained = lambda weight: weight.float()
        self._tensors = saved_state(module)
        self._layers: dict[str, Any] = {
            weight_name(n, layer.dsee_spec): layer for n, layer in adapted_layers(module).items()
        }

    def read(self, entries: list[Entry], *, updates: bool) -> Iterator[tuple[Tensor, Delta | None] | None]:
        """Collective. Adapters of all entries in one transfer, then each weight on its own to rank 0."""
        names = [entry.name for entry in entries if updates and entry.name in self._layers]
        flats = dict(
            zip(names, self.partition.gather([self._layers[n].dsee_flat for n in names]), strict=True)
        )
        tensors = [self._tensors[entry.name] for entry in entries]
        stream = self.partition.gather_each([t for t in tensors if isinstance(t, nn.Parameter)])
        for entry, tensor in zip(entries, tensors, strict=True):
            whole = next(stream) if isinstance(tensor, nn.Parameter) else tensor
            flat = flats.get(entry.name)
            update = None if flat is None else delta_record(self._layers[entry.name], flat)
            yield None if whole is None else (whole, update)
            del whole  # before the next one arrives

    def stored(self, entry: Entry, value: Tensor) -> Mapping[str, Tensor]:
        """A tensor as transformers stores it. Local."""
        state = {entry.name: value.detach()}
        return reverted(self.module, state) if entry.converted else state

    def write_adapter(self, new: NewFolder) -> None:
        """Collective. The adapter's own folder."""
        write_adapter(self.partition, self.module, new)

    def write_settings(self, new: NewFolder) -> None:
        """What `save_pretrained` writes besides weights. Local, rank 0."""
        module, folder = self.module, new.partial
        if hasattr(module, "save_pretrained"):
            config = copy.deepcopy(self.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # the weights are written decoded
            floating = (stored_dtype(param) for param in module.parameters() if param.is_floating_point())
            config.dtype = str(next(floating, module.dtype)).removeprefix("torch.")
            config.architectures = [type(module).__name__]
            vars(config).pop(REFIT, None)
            mark = refit_mark(module)
            if self.cut:  # with the update put in it is another model
                specs = {name: layer.dsee_spec for name, layer in adapted_layers(module).items()}
                mark = merged_mark(mark, specs, trained_in_full(module))
            if mark is not None:
                setattr(config, REFIT, mark)
            if module.is_remote_code():
                from transformers.dynamic_module_utils import custom_object_save

                custom_object_save(module, str(folder), config=config)  # which it names in the config
            config.save_pretrained(folder)
            if module.can_generate():
                # Its own `save_pretrained` refuses settings that loading only warns of, once any of them has changed.
                module.generation_config.to_json_file(
                    folder / "generation_config.json", keys_to_pop=["compile_config"]
                )
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)


def reject_unknown_quantisation(module: nn.Module, partition: Partition) -> None:
    """Refuse weights that are quantised by something else than bitsandbytes. Local."""
    for name, param in module.named_parameters():
        if not holds_numbers(param.dtype) and id(param) not in partition.codecs:
            raise TargetError(
                f"{name} is quantised ({type(param).__name__}, {param.dtype}), in a way that is not known here; "
                "expected floating-point weights or bitsandbytes: save the adapter, load the base unquantised, "
                "load_adapter, and export that"
            )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer (or a processor) and the sentencepiece file that it was read from. Local.

    transformers 5 leaves that file out, which other programs read.
    """
    tokenizer.save_pretrained(str(folder))
    origin = getattr(tokenizer, "name_or_path", None)
    sources = [getattr(tokenizer, "vocab_file", None), origin and Path(origin) / SENTENCEPIECE_FILE]
    for source in (Path(path) for path in sources if path):
        if source.name == SENTENCEPIECE_FILE and source.is_file():
            shutil.copyfile(source, folder / SENTENCEPIECE_FILE)
            return


def save_base(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> None:
    """Collective. Write the frozen weights as a plain Hugging Face folder; adapters saved later name it as their base.

    Args:
        model: what `export_model` takes.
        folder: output folder; an earlier base in it is replaced.
        tokenizer: saved along.
    """
    export_model(model, folder, delta="none", tokenizer=tokenizer, overwrite=True)
    config: Any = getattr(unwrap(model), "config", None)
    if config is not None:
        config._name_or_path = str(folder)


def base_of(checkpoint: str | Path, published: str) -> str:
    """The base that a Trainer's checkpoint goes on from: after a re-fit `base` beside it, else `published`. Local.

        model = AutoModelForCausalLM.from_pretrained(base_of(checkpoint, "meta-llama/Llama-3.1-8B"))
        load_adapter(model, checkpoint)

    Args:
        checkpoint: what `DSEECallback` or a run saved, in its output folder.
        published: hub id or folder of the model that the training began with.

    Raises:
        FormatError: it is no whole checkpoint, or `base` is missing.
    """
    if not AdapterRecord.read(open_folder(checkpoint, KINDS_WITH_ADAPTER)).refitted:
        return published
    folder = Path(checkpoint).parent / BASE_FOLDER
    if not folder.is_dir():
        raise FormatError(
            f"{checkpoint} continues from re-fitted weights, and {folder} is missing; take an older checkpoint"
        )
    return str(folder)


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Collective: every rank must run through it. The weights with their updates, on rank 0; nothing elsewhere.

    They have the names and shapes that stock transformers, and so vLLM's `load_weights`, knows. Pruned matrices are
    (W + D) * M or W * M + D, whichever is trained. In TRL's GRPO with a vLLM server:

        trainer.vllm_generation._iter_named_params = lambda: merged_weights(trainer.model_wrapped)

    Extra memory: the adapters of 2 GB of weights; on rank 0 two weights besides.

    Args:
        model: a raw model, a DeepSpeed engine, or what Accelerate or DDP made of it.

    Raises:
        TargetError: experts were removed.

    Yields:
        Name and whole weight, on the model's device. It may alias the model's own storage: read it.
    """
    if (
        torch.cuda.is_initialized()
    ):  # vLLM's sender reads on a stream of its own, the last step wrote on this one
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    module, partition = unwrap(model), open_partition(model)
    reject_unusable(module)
    if any("experts" in how for how in model_state(module).pruned.values()):
        raise TargetError(
            "experts were removed from this model, and an engine that has all of them would still choose them; write "
            "the smaller model with export_model, and load that"
        )
    source = LiveModel(module, partition, "2GB", cut=False)
    masked = masked_weights(source.pruned)
    for entries in source.plan.files.values():
        pieces = source.read(entries, updates=True)
        for entry in entries:
            piece = next(pieces)
            if piece is None or partition.rank:
                continue
            weight, update = piece
            if update is not None:
                form = trained_form(source.pruned, entry.name)
                pruned, out = entry.name in masked, torch.empty_like(weight)
                weight = merged_weight(weight, update, pruned=pruned, form=form, out=out)
            yield from source.stored(entry, weight).items()
            del piece, weight  # before the next one arrives
