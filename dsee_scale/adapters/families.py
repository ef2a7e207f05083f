"""Where heads and neurons are in an architecture: one short description per family.

A unit is what is removed together. Of attention: a head, or under grouped-query attention a whole key/value
group with all its query heads; its rows of q, k and v, its columns of o. Of the feed-forward: a neuron; its
rows of the matrices before the activation, its column of the one after it.

To add a family, describe its block and put it into `FAMILIES` under the `model_type` of its config (a
program may do so at run time):

    FAMILIES["my_type"] = dataclasses.replace(LLAMA, name="my_type", blocks="decoder.layers")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dsee_scale.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Where a block keeps its routed experts; how they lie in their parameters `matrices.expert_layout` says."""

    path: str = "mlp.experts"
    """The module that holds them; a block without it is dense."""
    router: str = "mlp.gate"
    """The module that chooses among them: its tensors have one row for each expert."""
    shared: str | None = None
    """The module that every token goes through besides, an ordinary feed-forward."""
    count_key: str = "num_local_experts"
    """Config key of the number of experts in a layer."""
    top_key: str = "num_experts_per_tok"
    """Config key of the experts that a token goes to."""
    neuron_key: str = "moe_intermediate_size"
    """Config key of an expert's number of neurons."""
    group_key: str | None = None
    """Config key of the number of equal groups that the router chooses among first."""
    top_group_key: str | None = "topk_group"
    """Config key of how many of these groups it chooses."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names within one transformer block of an architecture."""

    name: str
    """Label in messages and files."""
    blocks: str
    """End of the name of the ModuleList with the blocks."""
    qkv: tuple[str, ...]
    """The modules that make q, k and v, or the one that makes them side by side in equal thirds."""
    o: str
    """The module after the attention."""
    head_size: str
    """The attribute that holds the size of one head."""
    up: tuple[str, ...]
    """The modules before the activation."""
    down: str
    """The module after it."""
    activation: str
    """Config key of the activation's name."""
    head_keys: Mapping[str, str] = field(default_factory=dict)
    """Config key -> size (`heads`, `kv_heads`, `head_size`), where the config can express fewer heads."""
    neuron_key: str
    """Config key of the number of neurons."""
    head_attributes: Mapping[str, str] = field(default_factory=dict)
    """Attribute of a block -> size (`heads`, `kv_heads` or `width`), where its forward reads one."""
    experts: Experts | None = None
    """Routed experts, for a mixture of experts."""
    heads: str | None = None
    """Why heads can't be removed from it; None where they can."""


LLAMA = Family(
    name="llama",
    blocks="layers",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    head_size="self_attn.head_dim",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    activation="hidden_act",
    head_keys={
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_size",
    },
    neuron_key="intermediate_size",
)
GPT2 = Family(
    name="gpt2",
    blocks="h",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    head_size="attn.head_dim",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    activation="activation_function",
    neuron_key="n_inner",
    head_attributes={"attn.num_heads": "heads", "attn.split_size": "width"},
)
BERT = Family(
    name="bert",
    blocks="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    head_size="attention.self.attention_head_size",
    up=("intermediate.dense",),
    down="output.dense",
    activation="hidden_act",
    neuron_key="intermediate_size",
    head_attributes={
        "attention.self.num_attention_heads": "heads",
        "attention.self.all_head_size": "width",
    },
)
QWEN_MOE = dataclasses.replace(LLAMA, name="qwen_moe", experts=Experts())
MIXTRAL = dataclasses.replace(LLAMA, name="mixtral", experts=Experts(neuron_key="intermediate_size"))
GPT_OSS = dataclasses.replace(
    MIXTRAL,
    name="gpt_oss",
    experts=Experts(router="mlp.router", neuron_key="intermediate_size"),
    heads="each head has a sink of its own, which would have to go with it",
)
GLM_MOE = dataclasses.replace(
    LLAMA,
    name="glm_moe",
    experts=Experts(count_key="n_routed_experts", shared="mlp.shared_experts", group_key="n_group"),
)
DEEPSEEK = dataclasses.replace(
    GLM_MOE, name="deepseek", heads="its keys and values share one latent (multi-head latent attention)"
)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": BERT,
    "mixtral": MIXTRAL,
    "qwen2_moe": dataclasses.replace(
        QWEN_MOE, experts=Experts(count_key="num_experts", shared="mlp.shared_expert")
    ),
    "qwen3_moe": QWEN_MOE,
    "gpt_oss": GPT_OSS,
    "glm4_moe": GLM_MOE,
    "deepseek_v3": DEEPSEEK,
}


def family_of(model: nn.Module) -> Family:
    """The description of a model's architecture.

    Raises:
        TargetError: there is none; the message names those that exist, and where to add one.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if model_type not in FAMILIES:
        raise TargetError(
            f"heads and neurons of {type(model).__name__} (model_type {model_type!r}) are not described; "
            f"supported: {', '.join(sorted(FAMILIES))}. Describe its block in "
            "dsee_scale.adapters.families.FAMILIES"
        )
    return FAMILIES[model_type]


def find_blocks(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The transformer blocks by name."""
    found = {
        f"{name}.{index}": block
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{family.blocks}")
        for index, block in enumerate(module)
    }
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no blocks in a ModuleList '{family.blocks}'; expected the layout of "
            f"family {family.name!r}"
        )
    return found


def inner(block: Any, path: str, name: str) -> Any:
    """A module or attribute inside a block, by its dotted path."""
    for step in path.split("."):
        if not hasattr(block, step):
            raise TargetError(
                f"{name} has no {path}; its architecture is not what its model_type says, see "
                "dsee_scale.adapters.families.FAMILIES"
            )
        block = getattr(block, step)
    return block
