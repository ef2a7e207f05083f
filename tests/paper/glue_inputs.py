"""A small encoder with a tokenizer, and sentences whose class a word decides, for GLUE runs of seconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

SUBJECTS = ["film", "plot", "cast", "score", "scene", "end"]
WORDS = {"negative": ["dull", "weak", "cold", "flat"], "positive": ["fine", "great", "warm", "bright"]}
VOCABULARY = [
    "<pad>",
    "<eos>",
    "<unk>",
    "the",
    "is",
    "and",
    *SUBJECTS,
    *WORDS["negative"],
    *WORDS["positive"],
]
SIZES: dict[str, Any] = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=12,
    intermediate_size=66,
    max_position_embeddings=40,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
RELATIVE: dict[str, Any] = dict(
    relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"], type_vocab_size=0
)
ENCODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, {}),
    "roberta": (RobertaConfig, RobertaModel, {}),
    "deberta": (DebertaConfig, DebertaModel, RELATIVE),
    "deberta-v2": (DebertaV2Config, DebertaV2Model, RELATIVE),
}


def write_encoder(folder: Path, kind: str = "bert") -> Path:
    """A model folder with a word tokenizer."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    config, model, extra = ENCODERS[kind]
    torch.manual_seed(0)
    encoder: nn.Module = model(config(**SIZES, **extra))
    for name, param in encoder.named_parameters():
        if "embeddings" not in name:
            nn.init.normal_(param, std=0.1) if param.dim() > 1 else None
    encoder.save_pretrained(folder)  # type: ignore[operator]
    return folder


def sentences(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of SST-2's shape."""
    names = list(WORDS)
    return [
        {
            "sentence": f"the {SUBJECTS[i % 6]} is {WORDS[names[i % 2]][(i // 2) % 4]} and the {SUBJECTS[i % 5]}",
            "label": names[i % 2],
        }
        for i in range(start, start + count)
    ]


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of STS-B's shape: the more alike, the higher the score."""
    rows = []
    for i in range(start, start + count):
        same = i % 2 == 0
        first = WORDS["positive"][i % 4]
        second = first if same else WORDS["negative"][i % 4]
        rows.append(
            {"sentence1": f"the film is {first}", "sentence2": f"the plot is {second}", "label": 5.0 * same}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A CSV or JSON-lines file, by the ending."""
    if path.suffix == ".json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def write_files(folder: Path, rows: Any = sentences, ending: str = "csv") -> list[str]:
    """Training, validation and test file as flags; the test file has no labels."""
    test = [{k: v for k, v in row.items() if k != "label"} for row in rows(6, 100)]
    return [
        *("--train_file", write_rows(folder / f"train.{ending}", rows(48))),
        *("--validation_file", write_rows(folder / f"validation.{ending}", rows(18, 48))),
        *("--test_file", write_rows(folder / f"test.{ending}", test)),
    ]


SHORT = "--do_train --do_eval --max_steps 30 --save_steps 15 --logging_steps 15 --evaluation_strategy steps --seed 1 "
SHORT += (
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 4 --max_seq_length 16 --disable_tqdm True "
)
SHORT += "--load_best_model_at_end True --metric_for_best_model eval_accuracy --learning_rate 2e-2 --lora_r 3"


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "all_results.json").read_text())


def deepspeed_file(folder: Path) -> list[str]:
    """Flags that partition the weights."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto",
                "betas": "auto",
                "eps": "auto",
                "weight_decay": "auto",
                "torch_adam": True,
            },
        },
    }
    (folder / "zero3.json").write_text(json.dumps(config))
    return ["--deepspeed", str(folder / "zero3.json")]
