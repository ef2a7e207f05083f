"""A tiny model folder, a tokenizer, data files and a recipe, for runs of seconds."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

import dsee_scale
from dsee_scale import DSEEConfig
from tests.models import build, llama_config

SUBJECTS = ["film", "plot", "cast", "score", "scene", "end"]
GOOD, BAD = ["fine", "great", "warm", "bright"], ["dull", "weak", "cold", "flat"]
WORDS = ["<pad>", "<eos>", "<unk>", "positive", "negative", "Review", "Sentiment", ":", "is", "the", "and"]
WORDS += SUBJECTS + GOOD + BAD


def write_inputs(folder: Path, rows: int = 60) -> None:
    """`model/`, `train.csv`, `validation.csv`: sentences whose label a word decides."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    build(
        llama_config(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, bos_token_id=None)
    ).save_pretrained(folder / "model")  # type: ignore[operator]
    rng = random.Random(0)
    for name, count in (("train", rows), ("validation", 21)):
        lines = ["text,label"]
        for index in range(count):
            words = [GOOD, BAD][index % 2]
            extra = f" and the {rng.choice(SUBJECTS)} is {rng.choice(words)}" * rng.randrange(3)
            text = f"the {rng.choice(SUBJECTS)} is {rng.choice(words)}{extra}"
            lines.append(f"{text},{['positive', 'negative'][index % 2]}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def tiny_recipe(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe with all phases: 6 + 5 steps of 12 examples on two ranks. `changes`: `section__key=value`."""
    values: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "data": {
            "task": "classification",
            "train_file": str(folder / "train.csv"),
            "validation_file": str(folder / "validation.csv"),
            "prompt": "Review : {text} Sentiment :",
            "labels": {"positive": " positive", "negative": " negative"},
            "max_length": 48,
        },
        "dsee": {
            "rank": 4,
            "num_sparse": 8,
            "target_modules": ["q_proj", "v_proj"],
            "decomposition": {"rank": 4},
        },
        "prune": {"scope": "global", "score": "WABS", "sparsity": 0.5},
        "training": {
            "output_dir": str(output),
            "deepspeed": copy.deepcopy(DEEPSPEED),
            "max_steps": 6,
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0.2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 4,
            "dataloader_drop_last": True,
            "disable_tqdm": True,
            "seed": 3,
        },
        "retune": {"max_steps": 5, "learning_rate": 5e-3},
        "export": {"delta": "masked"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return values


DEEPSPEED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
}


def losses(output: Path) -> dict[int, float]:
    """Training loss by step, from a run's metrics."""
    import json

    metrics = json.loads((output / "metrics.json").read_text())
    return {entry["step"]: entry["loss"] for entry in metrics["training"]}


def zero_share(folder: Path) -> tuple[int, int]:
    """Zeros and entries of the block weights in an exported folder."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    blocks = [t for name, t in tensors.items() if ".layers." in name and t.ndim == 2]
    return sum(int((t == 0).sum()) for t in blocks), sum(t.numel() for t in blocks)


@contextlib.contextmanager
def stock_trainer(
    base: str,
    checkpoint: str | None,
    config: DSEEConfig,
    rows: Any,
    callback: TrainerCallback,
    collate: Any = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """On a pool's rank: a stock Trainer under ZeRO-3 with one callback; adapters are new, or a checkpoint's."""
    from dsee_scale.training.setup import kept_environment, make_arguments

    try:
        with kept_environment():
            args = make_arguments(dict(report_to="none", disable_tqdm=True, deepspeed="zero3_cpu") | settings)
            model = AutoModelForCausalLM.from_pretrained(base)
            if checkpoint is None:
                dsee_scale.inject(model, config)
            else:
                dsee_scale.load_adapter(model, checkpoint)
            yield Trainer(model, args, collate, train_dataset=rows, callbacks=[callback])
    finally:
        gc.collect()
