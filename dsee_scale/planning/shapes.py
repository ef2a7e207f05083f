"""Sizes of decoders, from their configs: what planning needs to know of a model without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of equal blocks.

    Attributes:
        name: as it was asked for.
        hidden: width of the residual stream.
        layers: number of blocks.
        vocab: entries of the embedding.
        tied: whether the output head is the embedding.
        matrices: (outputs, inputs) of each linear layer of a block, by its last name.
        gated: whether the feed-forward network has a gate.
        repeated: width of keys or values after heads were repeated for grouped-query attention.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    tied: bool
    matrices: Mapping[str, tuple[int, int]]
    gated: bool = True
    repeated: int = 0

    @property
    def block_entries(self) -> int:
        """Entries of all linear layers of the blocks."""
        return self.layers * sum(o * i for o, i in self.matrices.values())

    @property
    def other_entries(self) -> int:
        """Embedding, output head and norms."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All entries."""
        return self.block_entries + self.other_entries

    @property
    def largest(self) -> int:
        """Entries of the largest matrix of a block."""
        return max(o * i for o, i in self.matrices.values())


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


BUILT_IN = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32_000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128_256),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32_000),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128_256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128_256),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32_000),
}
"""Published dimensions of public models."""


def find_shape(name: str) -> ModelShape:
    """Sizes of a built-in shape, a folder with a `config.json`, or a hub id.

    Raises:
        ConfigError: there is no config, or it is not one of a decoder that is known here.
    """
    if name.lower() in BUILT_IN:
        return shape_of_config(BUILT_IN[name.lower()], name)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name} holds no config.json; expected a model folder, {_others()}")
        try:
            return shape_of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), name)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} has no config that could be read ({reason}); expected {_others()}"
        ) from error
    return shape_of_config(found.to_dict(), name)


def shape_of_config(config: Mapping[str, Any], name: str = "the model") -> ModelShape:
    """Sizes from a transformers config as a mapping.

    Raises:
        ConfigError: a size is missing.
    """
    config = config.get("text_config") or config
    if config.get("model_type") == "gpt2":
        return _gpt2(config, name)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing or config.get("num_experts") or config.get("num_local_experts"):
        lacking = f"has no {', '.join(missing)}" if missing else "has experts"
        raise ConfigError(
            f"{name}: its config (model_type {config.get('model_type')!r}) {lacking}; plan knows dense decoders "
            f"like Llama, Mistral and Qwen, and GPT-2; expected such a model, {_others()}"
        )
    hidden, inner, heads = (int(config[key]) for key in (needed[0], needed[1], needed[3]))
    head = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads) * head
    matrices = {
        "q_proj": (heads * head, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        matrices=matrices,
        repeated=heads * head,
    )


def _gpt2(config: Mapping[str, Any], name: str) -> ModelShape:
    hidden = int(config["n_embd"])
    inner = int(config.get("n_inner") or 4 * hidden)
    matrices = {
        "c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "c_fc": (inner, hidden),
        "mlp.c_proj": (hidden, inner),
    }
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=int(config["n_layer"]),
        vocab=int(config["vocab_size"]),
        tied=True,
        matrices=matrices,
        gated=False,
        repeated=hidden,
    )


def _others() -> str:
    return f"a hub id that can be reached, or a built-in shape: {', '.join(BUILT_IN)}"
