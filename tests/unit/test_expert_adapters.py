"""Adapters on fused experts of real architectures, in one process."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.disabled import adapters_disabled
from dsee_scale.adapters.experts import AdaptedExperts
from dsee_scale.adapters.linear import adapted_layers, delta_record, train_under_mask
from dsee_scale.algorithms.delta import merged_weight
from dsee_scale.checkpoint.record import _module_record
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.export.export import merged_weights
from tests.models import build, moe_config, token_batch

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
SETTINGS = DSEEConfig(rank=3, num_sparse=4, target_modules=("experts", "o_proj"))
SHARED = dataclasses.replace(SETTINGS, shared_expert_a=True)


def make(family: str, settings: DSEEConfig = SETTINGS, *, filled: bool = True) -> nn.Module:
    """An injected model whose updates are not zero."""
    model = build(moe_config(family)).eval()
    dsee_scale.inject(model, settings)
    if filled:
        fill(model)
    return model


def fill(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    for layer in adapted_layers(model).values():
        layer.dsee_flat.data.copy_(torch.randn(layer.dsee_flat.shape, generator=g) * 0.05)


@torch.no_grad()
def dense_twin(model: nn.Module, family: str) -> nn.Module:
    """A stock model with every update put into its weight."""
    twin = build(moe_config(family)).eval()
    params = dict(twin.named_parameters())
    for name, layer in adapted_layers(model).items():
        weight = params[name if layer.dsee_spec.experts else f"{name}.weight"]
        delta = delta_record(layer, layer.dsee_flat)
        merged_weight(layer.weight.data, delta, pruned=layer.dsee_under_mask, form="masked", out=weight.data)
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_injection_changes_no_bit_and_every_expert_gets_its_update(family):
    base = build(moe_config(family)).eval()
    tokens = token_batch(batch=4, length=16)
    model = make(family, filled=False)
    assert torch.equal(model(tokens).logits, base(tokens).logits)
    experts = [name for name, layer in adapted_layers(model).items() if layer.dsee_spec.experts]
    assert experts and all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in experts)

    fill(model)
    torch.testing.assert_close(
        model(tokens).logits, dense_twin(model, family)(tokens).logits, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(model(tokens).logits, base(tokens).logits, atol=1e-4)
    with adapters_disabled(model):
        assert torch.equal(model(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_merged_experts(shared, masked):
    model = make("qwen3_moe", SHARED if shared else SETTINGS)
    tokens = token_batch(batch=4, length=16)
    layers = {n: layer for n, layer in adapted_layers(model).items() if layer.dsee_spec.experts}
    for layer in layers.values():
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
        train_under_mask(layer, masked)
    model(tokens, labels=tokens).loss.backward()

    twin = copy.deepcopy(model).requires_grad_(False)
    for layer in adapted_layers(twin).values():
        if not layer.dsee_spec.experts:
            continue
        delta = delta_record(layer, layer.dsee_flat)
        form = "masked" if masked else "dense"
        merged_weight(layer.weight.data.clone(), delta, pruned=True, form=form, out=layer.weight.data)
        layer.dsee_flat.data.zero_()
        layer.dsee_under_mask = False
        layer.weight.requires_grad_()
    for module in twin.modules():
        if isinstance(module, AdaptedExperts):
            module.dsee_disabled = True
    twin(tokens, labels=tokens).loss.backward()
    for name, layer in layers.items():
        spec, other = layer.dsee_spec, adapted_layers(twin)[name]
        full = other.weight.grad * (layer.weight != 0) if masked else other.weight.grad
        a, b, _ = spec.split(layer.dsee_flat.detach())
        ga, gb, gv = spec.split(layer.dsee_flat.grad)
        for e, (*_, of_a, of_b) in enumerate(spec.per_slice()):
            torch.testing.assert_close(gb[of_b], spec.scaling * full[e] @ a[of_a].t(), rtol=2e-4, atol=2e-7)
        expected = torch.stack(
            [spec.scaling * b[of_b].t() @ full[e] for e, (*_, of_b) in enumerate(spec.per_slice())]
        )
        expected = expected.sum(0) if shared else expected.flatten(0, 1)
        torch.testing.assert_close(ga, expected, rtol=2e-4, atol=2e-7)
        at = full.flatten(0, 1)[layer.dsee_rows.long(), layer.dsee_cols.long()]
        torch.testing.assert_close(gv, spec.scaling * at, rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_saved_adapters_merged_weights_and_exports_are_what_was_trained(family, shared, tmp_path):
    model = make(family, SHARED if shared else SETTINGS)
    tokens = token_batch(batch=4, length=16)
    expected = model(tokens).logits
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    loaded = build(moe_config(family)).eval()
    dsee_scale.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(tokens).logits, expected)

    dsee_scale.export_model(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert "dsee" not in type(stock.model.layers[0].mlp.experts).__module__
    torch.testing.assert_close(stock(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    for name, value in merged_weights(model):
        assert not name.rpartition(".")[2].startswith("dsee_") and value.isfinite().all()
    with pytest.raises(ConfigError, match="adapters on experts"):
        dsee_scale.export_lora(model, tmp_path / "lora")


def test_training_goes_on_from_a_saved_state(tmp_path):
    tokens = token_batch(batch=4)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(2):
            losses.append(model(tokens, labels=tokens).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in losses]

    model = make("qwen3_moe", SHARED).train()
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    steps(model, optimizer)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="WABS", scope="matrix"))
    save_training_state(model, tmp_path / "state", optimizer=optimizer)
    again = build(moe_config("qwen3_moe")).train()
    dsee_scale.load_adapter(again, tmp_path / "state")
    assert all(layer.dsee_under_mask for layer in adapted_layers(again).values())
    fresh = torch.optim.AdamW(dsee_scale.trainable_parameters(again), lr=1e-2)
    load_training_state(again, tmp_path / "state", optimizer=fresh)
    assert steps(again, fresh) == steps(model, optimizer)


def test_records_from_before_experts_could_be_adapted_are_read():
    values = dataclasses.asdict(
        adapted_layers(make("qwen3_moe"))["model.layers.0.self_attn.o_proj"].dsee_spec
    )
    del values["experts"], values["shared_a"]
    assert not _module_record("o_proj", values).experts
    with pytest.raises(ConfigError, match="do not fit"):
        _module_record("o_proj", {**values, "experts": False, "shared_a": True})


def test_a_state_dict_that_brings_a_mask_into_experts_is_warned_of():
    pruned, other = make("qwen3_moe"), make("qwen3_moe")
    masked = PruneConfig(sparsity=0.5, score="W", modules=("gate_up_proj", "down_proj"))
    dsee_scale.prune(pruned, masked)
    with pytest.warns(UserWarning, match="no state dict says that they are a mask"):
        other.load_state_dict(pruned.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned.load_state_dict(pruned.state_dict())
        make("qwen3_moe").load_state_dict(make("qwen3_moe").state_dict())


def test_a_copied_model_computes_the_same():
    model = make("qwen3_moe")
    tokens = token_batch()
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_goes_down_with_activation_checkpointing(checkpointing):
    model = make("qwen3_moe", filled=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = token_batch(batch=4)
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("family", "settings", "error", "says"),
    [
        ("qwen3_moe", dict(target_modules=("mlp.gate",)), TargetError, "is a router"),
        ("gpt_oss", dict(target_modules=("router",)), TargetError, "is a router"),
        ("qwen3_moe", dict(target_modules=("experts",), dropout=0.1), ConfigError, "dropout"),
        ("qwen3_moe", dict(target_modules=("experts",), rank=13), ConfigError, "rank 13"),
        ("qwen3_moe", dict(target_modules=("q_proj",), shared_expert_a=True), ConfigError, "no effect"),
        (
            "qwen3_moe",
            dict(target_modules=("experts",), output_slices={"down_proj": ("0:4",)}),
            ConfigError,
            "output_slices",
        ),
        (
            "qwen3_moe",
            dict(target_modules=("experts",), trained_modules=("mlp",)),
            TargetError,
            "trained in full as well",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(family, settings, error, says):
    model = build(moe_config(family))
    with pytest.raises(error, match=says):
        dsee_scale.inject(model, DSEEConfig(**{"rank": 3, "num_sparse": 4, **settings}))
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("family", "noise"), [("mixtral", "router_jitter_noise"), ("phimoe", "input_jitter_noise")]
)
def test_blocks_that_add_noise_to_their_input_in_place_are_trained(family, noise):
    model = build(moe_config(family, **{noise: 0.01})).train()
    dsee_scale.inject(model, dataclasses.replace(SETTINGS, target_modules=("experts",)))
    tokens = token_batch()
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.dsee_flat.grad.any() for layer in adapted_layers(model).values())


def test_another_implementation_of_the_experts_is_refused():
    model = build(moe_config("qwen3_moe"))
    model.set_experts_implementation("eager")
    with pytest.raises(TargetError, match="set_experts_implementation"):
        dsee_scale.inject(model, SETTINGS)


def test_experts_in_fp8_are_refused():
    model = build(moe_config("qwen3_moe"))
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    says = r"layers\.1\.mlp\.experts.*float8_e4m3fn"
    with pytest.raises(TargetError, match=says):
        dsee_scale.inject(model, SETTINGS)
    assert not adapted_layers(model)
    for pruning in (
        PruneConfig(pattern="2:4", score="W", refit=False),
        PruneConfig(pattern="experts", num_per_layer=1, score="random"),
    ):
        with pytest.raises(TargetError, match=says):
            dsee_scale.prune(model, pruning)


def test_a_linear_router_is_refused():
    model = build(moe_config("qwen3_moe"))
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(20, 5, bias=False)
    with pytest.raises(TargetError, match="is a router"):
        dsee_scale.inject(model, dataclasses.replace(SETTINGS, target_modules=("mlp.gate",)))


def test_experts_that_lost_what_transformers_notes_on_them_are_named():
    model = build(moe_config("qwen3_moe"))
    del model.model.layers[0].mlp.experts.is_transposed
    with pytest.raises(
        TargetError, match=r"import transformers\.models\.qwen3_moe\.modeling_qwen3_moe before"
    ):
        dsee_scale.inject(model, DSEEConfig(rank=2, target_modules=("layers.0.mlp.experts",)))
