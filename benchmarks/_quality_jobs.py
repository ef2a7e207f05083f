"""The jobs of benchmarks/quality.py: what is learned, from which rows, and how it is judged."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dsee_scale.data.encoding import Encoder
from dsee_scale.data.rows import load_rows
from dsee_scale.evaluation.evaluate import EvaluationSet
from dsee_scale.recipe.sections import DataConfig

METRIC = {"sentiment": "accuracy", "e2e": "loss", "text": "perplexity"}
"""What a job's rows are compared by."""
RATE = {"sentiment": 1e-3, "e2e": 2e-3, "text": 1e-3}
"""The highest learning rate of every row; E2E's is the better one of 1e-3 and 2e-3 for dense LoRA."""
CALIBRATION = {"sentiment": 768, "e2e": 256, "text": 256}
"""Training rows that a pruning looks at: 16,000 to 25,000 tokens, 65,000 of text, whose loss it keeps lowering."""
EVALUATION = {"sentiment": 1000, "e2e": 400, "text": 400}
"""Held-out rows; of 400 sentences one more or less is a quarter of a point, and two seeds differ by several."""
TEXT_LENGTH = 256
METRIC_WORDS = {**METRIC, "text": f"perplexity@{TEXT_LENGTH}"}
"""The same for people: a perplexity says nothing without the length of its sequences."""


@dataclass(frozen=True)
class Job:
    """One job, as tokens.

    Attributes:
        name: `sentiment`, `e2e` or `text`.
        train: columns `input_ids` and `labels`.
        evaluation: held-out examples.
        generation: arguments of `generate`.
        batch_size: rows of a step.
        judged_by: held-out examples made of training rows, given their numbers; classification only.
    """

    name: str
    train: Dataset
    evaluation: EvaluationSet
    generation: dict[str, int]
    batch_size: int
    judged_by: Callable[[Sequence[int]], EvaluationSet]


def load_job(
    name: str, tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], work: Path, num_eval: int
) -> Job:
    """Read and encode a job's rows.

    Args:
        name: see `Job`.
        tokenizer: the model's.
        files: `sentiment`: train.csv and validation.csv of examples/demo; `e2e`: one CSV with mr and ref, of which a
            sixth of the meaning representations is held out; `text`: text to train on and text to judge by.
        work: where a split is kept.
        num_eval: held-out rows at most.
    """
    if name == "e2e":
        files = split_meanings(files[0], work)
    common = {"train_file": str(files[0]), "validation_file": str(files[1]), "max_eval_samples": num_eval}
    configs = {
        "sentiment": dict(
            task="classification",
            prompt="Review: {text}\nSentiment:",
            labels={"negative": " negative", "positive": " positive"},
            max_length=64,
        ),
        "e2e": dict(task="completion", prompt="{mr} ||", completion=" {ref}", max_length=192),
        "text": dict(task="language_modelling", separator="\n", max_length=TEXT_LENGTH),
    }
    config = DataConfig(**common, **configs[name])  # type: ignore[arg-type]
    encoder, (train, held_out) = Encoder(tokenizer, config), load_rows(config)
    classified = config.task == "classification"
    pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    evaluation = EvaluationSet(
        answers=() if classified else encoder.evaluation_examples(held_out)[:num_eval],
        choices=encoder.choices(held_out) if classified else (),
        generations=encoder.generations(held_out, 60) if name == "e2e" else (),
        pad_id=pad_id,
    )
    return Job(
        name,
        encoder.training_examples(train),
        evaluation,
        generation={"max_new_tokens": 64, "num_beams": 4, "no_repeat_ngram_size": 4},
        batch_size=16 if classified else 8,
        judged_by=lambda rows: EvaluationSet(choices=encoder.choices(train.select(rows)), pad_id=pad_id),
    )


def split_meanings(source: Path, work: Path) -> list[Path]:
    """train.csv and held-out.csv without a meaning representation in common."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    meanings = sorted({row["mr"] for row in rows})
    held_out = set(random.Random(0).sample(meanings, len(meanings) // 6))
    paths = [work / "e2e-train.csv", work / "e2e-held-out.csv"]
    for path, inside in zip(paths, (False, True), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if (row["mr"] in held_out) == inside)
    return paths
