"""One run: load, inject, tune, prune, retune, export, report."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import TrainingArguments, set_seed

from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.record import AdapterRecord
from dsee_scale.checkpoint.training_state import KIND
from dsee_scale.data.encoding import Encoder, collator
from dsee_scale.distributed import meet_until, raise_on_all_ranks, rank
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.evaluation.evaluate import EvaluationSet, load_examples
from dsee_scale.evaluation.export_check import check_export
from dsee_scale.export.export import BASE_FOLDER, export_model
from dsee_scale.export.hub import push_to_hub
from dsee_scale.export.lora import export_lora
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.passes.inject_model import inject
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.recipe.sections import ExportConfig, ModelConfig
from dsee_scale.training.checkpoints import read_record
from dsee_scale.training.journal import Journal, count_zeros, describe_run, peak_memory, to_jsonable
from dsee_scale.training.report import METRICS_FILE, card_notes, write_metrics, write_report
from dsee_scale.training.setup import (
    kept_environment,
    load_model,
    load_tokenizer,
    model_dtype,
    training_arguments,
)
from dsee_scale.training.start import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    RECIPE_FILE,
    RECIPE_MARK,
    check_plan,
    check_results,
    check_weights,
    explained_start,
    locked,
)
from dsee_scale.training.survival import limited_waiting, newest_first, report_lost_rank, resume_folder
from dsee_scale.training.timeline import build_timeline, steps_per_epoch
from dsee_scale.training.trainer import DSEETrainer

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> Path:
    """Collective. Tune, prune, retune, evaluate and export as the recipe says.

    Every rank calls it with the same recipe, under `deepspeed`, `accelerate launch`, `torchrun` or alone.

    Returns:
        The output folder: `checkpoint-STEP/`, `adapter/`, `model/`, `metrics.json`, `report.html`,
        `recipe.yaml`.

    Raises:
        DSEEError: bad settings, data or files; the same on every rank, before any training.
        RunError: the loss is NaN or infinite; the same on every rank.
        RunStoppedError: SIGTERM, after a checkpoint; or, on each rank that is left, that another rank is lost.
    """
    journal = Journal()
    with kept_environment(), explained_start(journal):
        args = training_arguments(recipe)
        with (
            limited_waiting(args.ddp_timeout),
            report_lost_rank(journal, args.ddp_timeout),
            locked(Path(str(args.output_dir))),
        ):
            return _run(recipe, args, journal)


def _run(recipe: Recipe, args: TrainingArguments, journal: Journal) -> Path:
    output = Path(str(args.output_dir))
    checkpoint = resume_folder(recipe, args)
    with raise_on_all_ranks(what="looking at the output folder"):
        if args.process_index == 0:
            check_results(output)
    trainer = build_trainer(recipe, args, checkpoint, journal)
    main = trainer.is_world_process_zero()
    with raise_on_all_ranks(what="writing the recipe"):
        if main:
            _write_recipe(recipe, output)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.timeline.check_finished(trainer.state.global_step, journal.prunings)
    with journal.timed("save"):
        save_adapter(trainer.model_wrapped, output / ADAPTER_FOLDER, overwrite=True)
    # What the training was for is safe before anything else can go wrong.
    _write_numbers(output, trainer)
    if recipe.export is not None:
        _export(recipe, recipe.export, trainer, output / MODEL_FOLDER)
        _write_numbers(output, trainer)
        if recipe.export.push_to_hub is not None:
            _push(output / MODEL_FOLDER, recipe.export.push_to_hub, args.device)
    return output


def _write_recipe(recipe: Recipe, output: Path) -> None:
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    (output / RECIPE_FILE).write_text(RECIPE_MARK + text, encoding="utf-8")


def _write_numbers(output: Path, trainer: DSEETrainer) -> None:
    """Collective. The metrics and the report, by rank 0."""
    with raise_on_all_ranks(what="writing the report"):
        if not trainer.is_world_process_zero():
            return
        trainer.journal.sizes |= _sizes(output)
        write_metrics(output, trainer.journal, trainer.state.log_history)
        try:
            write_report(output)
        except ConfigError as error:
            logger.warning("%s holds all numbers, but %s", output / METRICS_FILE, error)


def build_trainer(
    recipe: Recipe, args: TrainingArguments, checkpoint: Path | None, journal: Journal
) -> DSEETrainer:
    """Collective. Data, model and adapters (a checkpoint's, with its masks, where there is one)."""
    with raise_on_all_ranks(what="loading the tokenizer"):
        tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.data)
    with journal.timed("data"):
        train_rows, evaluation = read_data(recipe, args, encoder)
    timeline = build_timeline(recipe, args, steps_per_epoch(len(train_rows), args))
    args.max_steps = timeline.num_steps
    done: list[dict[str, Any]] = []
    if checkpoint is not None:
        with raise_on_all_ranks(what=f"reading {checkpoint}"):
            record = read_record(checkpoint)
            step, done = record["trainer"]["global_step"], record["journal"].get("prunings", [])
            timeline.check_resumed(step, done, str(checkpoint))
    with journal.timed("load"):
        set_seed(args.seed)
        with raise_on_all_ranks(what="reading the base model"):
            base = _base(recipe, args, checkpoint)
            check_weights(base.name)
        model = load_model(base, model_dtype(recipe, args), tokenizer)
    with journal.timed("inject"):
        if checkpoint is None:
            inject(model, recipe.dsee)
        else:
            with raise_on_all_ranks(what=f"reading {checkpoint}"):
                _check_same_adapters(recipe, checkpoint)
            load_adapter(model, checkpoint)
    check_plan(model, recipe, timeline, done, tokenizer)
    # Called gradient_checkpointing in transformers before 5.21.
    if getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False):
        # With every input frozen, reentrant checkpointing would cut the graph before the first adapter.
        model.enable_input_require_grads()  # type: ignore[operator]
    journal.run = describe_run(recipe, args, model)
    return DSEETrainer(
        timeline=timeline,
        journal=journal,
        evaluation=evaluation,
        generation=dict(recipe.data.generation),
        calibration_samples=recipe.data.calibration_samples,
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=evaluation,  # type: ignore[arg-type]
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
    )


def _base(recipe: Recipe, args: TrainingArguments, checkpoint: Path | None) -> ModelConfig:
    """The recipe's base model, or what a re-fit made of it before the checkpoint was saved. Local."""
    if checkpoint is None or not AdapterRecord.read(open_folder(checkpoint, (KIND,))).refitted:
        return recipe.model
    folder = Path(str(args.output_dir)) / BASE_FOLDER
    if not folder.is_dir():
        beside = checkpoint.parent / BASE_FOLDER
        advice = f"copy {beside} there" if beside.is_dir() else "resume an older checkpoint"
        raise FormatError(f"{checkpoint} continues from re-fitted weights, and {folder} is missing; {advice}")
    open_folder(folder, (EXPORT,)).verify_all(rank=args.process_index, world_size=args.world_size)
    return dataclasses.replace(recipe.model, name=str(folder), revision=None)


def read_data(recipe: Recipe, args: TrainingArguments, encoder: Encoder) -> tuple[Dataset, EvaluationSet]:
    """Collective. Training examples and the validation set as tokens.

    The first process of a machine tokenizes, the others read its cache.
    """
    first = args.main_process_first(desc="tokenizing")
    with raise_on_all_ranks(what="reading the data"), first:
        return load_examples(encoder, num_generations=recipe.data.generate_samples)


def _check_same_adapters(recipe: Recipe, checkpoint: Path) -> None:
    """A resumed run has the checkpoint's adapters; a recipe that asks for others is an error. Local."""
    saved, asked = read_record(checkpoint)["dsee"], recipe.dsee.to_dict()
    differing = [
        f"{key}: {saved.get(key)!r} there, {value!r} here"
        for key, value in asked.items()
        if saved.get(key) != value
    ]
    if differing:
        raise ConfigError(f"{checkpoint} was trained with other dsee settings ({'; '.join(differing)})")


def _export(recipe: Recipe, config: ExportConfig, trainer: DSEETrainer, folder: Path) -> None:
    """Collective. Write the Hugging Face folder and, where it is one, judge it in stock transformers."""
    journal, live = trainer.journal, trainer.model_wrapped
    if config.adapter_format == "peft":
        with journal.timed("export"):
            export_lora(live, folder, tokenizer=trainer.processing_class, overwrite=True)
        return
    with raise_on_all_ranks(what="drawing the card's picture"):
        notes, pictures = card_notes(to_jsonable(journal.to_dict())) if not rank() else ("", {})
    with journal.timed("export"):
        report = export_model(
            live,
            folder,
            delta=config.delta,
            tokenizer=trainer.processing_class,
            overwrite=True,
            notes=notes,
            pictures=pictures,
        )
    if not config.check or config.delta == "separate" or report.loads_with != "transformers":
        return
    with journal.timed("check export"):
        found = check_export(
            folder,
            live,
            trainer.evaluation,
            trainer.processing_class,
            batch_size=trainer.args.eval_batch_size,
            device=trainer.args.device,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    memory, blocks = peak_memory(), count_zeros(live)
    if found:
        entries = sum(numel for _, numel in blocks.values())
        journal.add_phase(
            "exported",
            delta=config.delta,
            sparsity=report.num_zero / entries if entries else 0.0,
            zeros=report.num_zero,
            peak_memory_bytes=memory,
            **found,
        )


def _push(folder: Path, repo: str, device: torch.device) -> None:
    """Collective. Rank 0 uploads what was exported and checked; the others wait, however long it takes."""
    upload: Future[str] | None = None
    if not rank():
        upload = ThreadPoolExecutor(1).submit(push_to_hub, folder, repo)
    meet_until(None if upload is None else lambda seconds: bool(wait([upload], seconds).done), device=device)
    with raise_on_all_ranks(what=f"pushing {folder}"):
        if upload is not None:
            logger.warning("pushed %s: %s", folder, upload.result())


def _sizes(output: Path) -> dict[str, int]:
    """Bytes of what the run left. Local, rank 0."""
    checkpoints = newest_first(output)
    groups = {
        "adapter": (output / "adapter").glob("dsee_adapter*.safetensors"),
        "masks": (output / "adapter").glob("dsee_masks*.safetensors"),
        "exported weights": (output / "model").glob("*.safetensors"),
        "last checkpoint": checkpoints[0].rglob("*") if checkpoints else (),
    }
    sizes = {
        name: sum(path.stat().st_size for path in paths if path.is_file()) for name, paths in groups.items()
    }
    return {name: size for name, size in sizes.items() if size}
