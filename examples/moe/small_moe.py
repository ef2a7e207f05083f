"""The base model of `recipes/moe.yaml`: a Qwen3-MoE of 20 million parameters, trained on plain text in a few minutes.

    python examples/moe/small_moe.py --text wiki.txt        # any plain text of a megabyte or more
    python examples/moe/small_moe.py                        # WikiText-2, from the hub
    python examples/demo/demo_inputs.py                     # the movie sentences that the recipe tunes on

It leaves `small-moe` in the cache: the model and a tokenizer of 2,048 words made from the text. Four layers of 24
experts, two of which a token goes to. One process; transformers' own Trainer, nothing of dsee_scale but the cache.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsee_scale.recipe.parsing import cache_folder

FOLDER = "small-moe"
WORDS, LENGTH = 2048, 128
END = "<|end|>"


def read_text(path: str | None) -> str:
    """A file, or WikiText-2's training part from the hub."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
    return "".join(rows["text"])


def make_tokenizer(text: str) -> Any:
    """Byte pairs learned from the text; every byte is a word, so nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model() -> Any:
    """Random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=WORDS,
            hidden_size=256,
            intermediate_size=256,
            moe_intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=24,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            output_router_logits=True,  # so that the loss keeps experts in use
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train(model: Any, blocks: list[list[int]], steps: int, batch: int, folder: str) -> tuple[float, float]:
    """Loss in nats per token of held-out blocks, before and after."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": block, "labels": block} for block in blocks]
    held_out = rows[:: max(2, len(rows) // 64)]
    kept = {id(row) for row in held_out}
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=1,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[row for row in rows if id(row) not in kept],
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def main() -> None:
    """Train the base model once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", metavar="FILE", help="plain text, UTF-8; default: WikiText-2 from the hub")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens")
    arguments = parser.parse_args()
    target = cache_folder() / FOLDER
    if target.exists():
        print(f"{target} is there already; remove it to train it anew")
        return
    text = read_text(arguments.text)
    tokenizer, model = make_tokenizer(text), make_model()
    ids = tokenizer(text, verbose=False)["input_ids"]
    blocks = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        before, after = train(model, blocks, arguments.steps, arguments.batch, work)
        model.config.output_router_logits = False
        model.save_pretrained(f"{work}/{FOLDER}")
        tokenizer.save_pretrained(f"{work}/{FOLDER}")
        os.rename(f"{work}/{FOLDER}", target)
    print(
        f"{target}: loss {before:.2f} before and {after:.2f} after training, in nats per token (a word chosen blindly: "
        f"{math.log(WORDS):.2f})"
    )


if __name__ == "__main__":
    main()
