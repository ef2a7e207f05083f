"""Sizes of decoders, from their configs: a model of the config on the meta device, which holds no weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError

Sizes = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What planning needs to know of a decoder.

    Attributes:
        name: as it was asked for.
        hidden: width of the residual stream.
        layers: number of blocks.
        vocab: entries of the embedding.
        tied: whether the output head is the embedding.
        parameters: all entries.
        matrices: (outputs, inputs) of every linear layer in the blocks, by its last name.
        experts: (outputs, inputs) of every expert's matrices, by the name of the tensor that holds a layer's.
        expert_entries: entries of experts that are one tensor of a whole block, in the blocks; also of those laid out
            in a way that is not known here.
        layer_experts: entries of the largest of these tensors.
        chosen: experts that a token goes to; 0 without.
        largest: entries of the largest tensor of a block.
        width: outputs of the feed-forward network that one token passes through.
        gated: whether it has a gate.
        repeated: width of keys or values after heads were repeated for grouped-query attention.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    tied: bool
    parameters: int
    matrices: Mapping[str, tuple[Sizes, ...]]
    experts: Mapping[str, tuple[Sizes, ...]]
    expert_entries: int
    layer_experts: int
    chosen: int
    largest: int
    width: int
    gated: bool
    repeated: int

    def target(self, name: str) -> tuple[Sizes, ...]:
        """Sizes of the matrices that a target means: linear layers', or experts'; empty if there is none."""
        if name == "experts":
            return tuple(size for sizes in self.experts.values() for size in sizes)
        return (*self.matrices.get(name, ()), *self.experts.get(name, ()))

    @property
    def experts_of_a_layer(self) -> int:
        """Experts whose matrices lie in one tensor; 0 without."""
        largest = max((o * i for sizes in self.experts.values() for o, i in sizes), default=0)
        return self.layer_experts // largest if largest else 0

    @property
    def block_entries(self) -> int:
        """Entries of all linear layers of the blocks: what bitsandbytes quantises."""
        return sum(o * i for sizes in self.matrices.values() for o, i in sizes)

    @property
    def other_entries(self) -> int:
        """Embedding, output head, norms, biases and experts."""
        return self.parameters - self.block_entries


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
        ConfigError: there is no config, or transformers knows no decoder for it.
    """
    from transformers import AutoConfig

    from dsee_scale.checkpoint.record import CONFIG_FILE
    from dsee_scale.export.structure import STRUCTURE_FILE
    from dsee_scale.pretrained import hub_note, read_config

    if name.lower() in BUILT_IN:
        return shape_of_config(AutoConfig.for_model(**BUILT_IN[name.lower()]), name)
    if (Path(name) / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{name} holds an adapter, not a model; plan for its base: dsee-scale inspect {name} says which"
        )
    if (Path(name) / STRUCTURE_FILE).is_file():
        raise ConfigError(
            f"{name} holds a model whose blocks are not alike, which ZeRO-3 can't load; plan for the base that "
            "it was cut from"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"{name} holds no config.json; expected a model folder, {_others()}")
    try:
        found = read_config(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} has no config that could be read ({reason}){hub_note(name)}; expected {_others()}"
        ) from error
    return shape_of_config(found, name)


def shape_of_config(config: Any, name: str = "the model") -> ModelShape:
    """Sizes of the decoder that transformers makes of a config.

    Raises:
        ConfigError: it makes none, or one without attention.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each config class fails in its own way
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{name}: transformers makes no decoder of its config (model_type {config.model_type!r}: {reason}); "
            f"expected a decoder, {_others()}"
        ) from error
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise ConfigError(
            f"{name}: its decoder (model_type {config.model_type!r}) has no attention heads, and the activations of "
            f"such a one are not known here; expected a decoder with attention, {_others()}"
        )
    return _shape_of_model(model, text, name)


def _shape_of_model(model: Any, config: Any, name: str) -> ModelShape:
    matrices = _matrices(model)
    experts = [p for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n]
    heads = int(config.num_attention_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = [math.prod(one) for group in matrices.values() for one in group]
    # What leads back to the residual stream has the inputs; on the way there gate and up may be one matrix.
    back = [
        inputs for group in matrices.values() for outputs, inputs in group if outputs == config.hidden_size
    ]
    width = max(back or [max(one) for group in matrices.values() for one in group])
    chosen = 0
    if experts:  # of each pair of tensors the smaller one leads back to the residual stream
        down = min(experts, key=lambda p: p.numel())
        chosen = getattr(config, "num_experts_per_tok", None) or down.shape[0]
        width = chosen * down.numel() // (down.shape[0] * config.hidden_size)
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=matrices,
        experts=_experts(model),
        expert_entries=sum(p.numel() for p in experts),
        layer_experts=max((p.numel() for p in experts), default=0),
        chosen=int(chosen),
        largest=max(*sizes, *(p.numel() for p in experts)),
        width=width,
        gated=any("gate_proj" in n or "gate_up" in n for n, _ in model.named_parameters()),
        repeated=heads * head,
    )


def _experts(model: Any) -> dict[str, tuple[Sizes, ...]]:
    """True sizes of the experts' matrices, by the last part of their parameters' names."""
    from dsee_scale.adapters.matrices import find_matrices

    found: dict[str, list[Sizes]] = {}
    for matrix in find_matrices(model, lambda param: param.shape).values():
        if matrix.expert is not None:
            found.setdefault(matrix.attribute, []).append(matrix.outputs_by_inputs)
    return {name: tuple(sizes) for name, sizes in found.items()}


def _matrices(model: Any) -> dict[str, tuple[Sizes, ...]]:
    """True sizes of the blocks' linear layers, by the last part of their names, or the last two where those differ."""
    from dsee_scale.adapters.targets import linear_kind
    from dsee_scale.passes.pools import block_linears

    found: dict[tuple[str, ...], list[Sizes]] = {}
    for name, module in block_linears(model).items():
        shape: Any = tuple(module.weight.shape)  # type: ignore[arg-type]
        within = tuple(part for part in name.split(".") if not part.isdigit())[-2:]
        found.setdefault(within, []).append(shape[::-1] if linear_kind(module) == "conv1d" else shape)
    last = [within[-1] for within in found]
    return {
        within[-1] if last.count(within[-1]) == 1 else ".".join(within): tuple(sizes)
        for within, sizes in found.items()
    }


def _others() -> str:
    return f"a hub id that can be reached, or a built-in shape: {', '.join(BUILT_IN)}"
