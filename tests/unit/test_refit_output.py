"""The second stage of a re-fit against the same steps in plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import ConfigError
from dsee_scale.passes.pools import block_linears
from dsee_scale.pruning.refit import sweep
from tests.models import build, llama_config, moe_config
from tests.unit.test_calibrate import batches, effective, make

STEPS = 12
HALF = PruneConfig(sparsity=0.5, scope="matrix")


def block_outputs(model: nn.Module, data: list[dict[str, Tensor]], index: int) -> list[Tensor]:
    """What a block of a Llama gives, (B, T, H) of each batch."""
    found: list[Tensor] = []
    handle = model.model.layers[index].register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    handle.remove()
    return found


def error(model: nn.Module, tuned: list[Tensor], data: list[dict[str, Tensor]]) -> float:
    """Mean squared error of the last block's output at tokens that count."""
    masks = [batch["attention_mask"].bool() for batch in data]
    pairs = zip(block_outputs(model, data, -1), tuned, masks, strict=True)
    return float(torch.cat([(a - b)[mask] for a, b, mask in pairs]).square().mean())


CASES = {
    "2:4": {"pattern": "2:4", "modules": ("*attn*",)},
    "unstructured": {"sparsity": 0.6, "scope": "matrix"},
    "update beside the mask": {"sparsity": 0.6, "scope": "matrix", "mask_update": False},
}


@pytest.mark.parametrize("config", CASES.values(), ids=list(CASES))
def test_the_same_entries_go_and_the_model_is_nearer_to_the_tuned_one(config: dict[str, Any]) -> None:
    model, data = make("everything"), batches(5)
    tuned = block_outputs(model, data, -1)
    swept = copy.deepcopy(model)
    dsee_scale.prune(swept, PruneConfig(**config), data)
    report = dsee_scale.prune(model, PruneConfig(block_steps=100, **config), data)
    assert error(model, tuned, data) < 0.6 * error(swept, tuned, data)
    for name, layer in block_linears(model).items():
        assert int((layer.weight == 0).sum()) == report.matrices.get(name, (0, 0))[0], name
        assert "forward" not in vars(layer) and layer.weight.grad is None
    first = [name for name in report.matrices if ".0." in name]  # later blocks see other inputs
    for name in first:
        assert torch.equal(model.get_submodule(name).weight == 0, swept.get_submodule(name).weight == 0), name
    for layer in adapted_layers(model).values():
        assert layer.dsee_flat.requires_grad and layer.dsee_flat.grad is None


def test_the_steps_are_adams_on_the_blocks_output() -> None:
    """One block, every batch of it at its turn, float64 against our float32."""
    model, data = make("everything"), batches(1)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    tuned = block_outputs(model, data, 0)[0].double()
    dense = copy.deepcopy(model)
    dsee_scale.prune(dense, HALF, data)
    dsee_scale.prune(model, dataclasses.replace(HALF, block_steps=STEPS), data)

    plain = copy.deepcopy(dense)
    weights = {name: effective(layer) for name, layer in block_linears(dense).items()}
    kept = {name: block_linears(dense)[name].weight != 0 for name in weights}
    for name in weights:  # stock layers with the swept weights
        holder, last = name.rsplit(".", 1)
        outputs, inputs = weights[name].shape
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        linear.weight.data.copy_(weights[name] * kept[name])
        setattr(plain.get_submodule(holder), last, linear)
    plain.double().requires_grad_(False)
    layers = {name: plain.get_submodule(name) for name in weights}
    rms = {name: (w.weight.square().sum() / kept[name].sum()).sqrt() for name, w in layers.items()}
    groups = [
        {"params": [layer.weight.requires_grad_()], "lr": 0.01 * float(rms[name])}
        for name, layer in layers.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-16)
    rates = [group["lr"] for group in groups]
    mask = data[0]["attention_mask"].bool()
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / STEPS)
        found: list[Tensor] = []
        handle = plain.model.layers[0].register_forward_hook(lambda *call, found=found: found.append(call[2]))
        plain(**data[0])
        handle.remove()
        (found[0] - tuned)[mask].square().mean().backward()
        for name, layer in layers.items():
            layer.weight.grad.mul_(kept[name])
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in block_linears(model).items():
        mine, reference = effective(layer) * (layer.weight != 0), layers[name].weight.detach()
        moved = (reference - weights[name] * kept[name]).norm()
        assert moved > 0 and (mine - reference).norm() < 1e-3 * moved, name


def test_gradients_that_float16_cannot_hold_end_no_pruning_half_way() -> None:
    """One channel of the residual is very large, as in Llama's at the first token."""
    model, data = build(llama_config(num_hidden_layers=3), torch.float16).requires_grad_(False), batches(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.1)
            if name.endswith("layers.1.mlp.down_proj.weight"):
                param[5] *= 3000
    tuned, swept = block_outputs(model, data, -1), copy.deepcopy(model)
    dsee_scale.prune(swept, HALF, data)
    dsee_scale.prune(model, dataclasses.replace(HALF, block_steps=40), data)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), swept.parameters(), strict=True))
    assert error(model, tuned, data) < error(swept, tuned, data)


def test_a_forward_that_somebody_else_gave_a_layer_is_there_again() -> None:
    """As accelerate's `add_hook_to_module` gives one."""
    model, data = make("everything"), batches(2)
    plain, config = copy.deepcopy(model), dataclasses.replace(HALF, block_steps=4)
    calls: list[str] = []

    def wrapped(name: str, forward: Any) -> Any:
        return lambda *args, **kwargs: calls.append(name) or forward(*args, **kwargs)

    layers = {name: layer for name, layer in block_linears(model).items() if "mlp" in name}
    given = {name: wrapped(name, layer.forward) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = given[name]
    dsee_scale.prune(model, config, data)
    dsee_scale.prune(plain, config, data)
    for name, layer in block_linears(model).items():
        assert vars(layer).get("forward") is given.get(name), name
        assert torch.equal(layer.weight, plain.get_submodule(name).weight), name
    calls.clear()
    model(**data[0])
    assert sorted(calls) == sorted(layers)


def test_it_goes_with_refit_alone() -> None:
    with pytest.raises(ConfigError, match="block_steps goes with refit"):
        PruneConfig(refit=False, block_steps=4)
    with pytest.raises(ConfigError, match="block_steps"):
        PruneConfig(block_steps=-1)


def test_experts_stay_as_the_sweep_left_them() -> None:
    model = build(moe_config("qwen3_moe")).eval()
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("q_proj", "experts")))
    swept, data = copy.deepcopy(model), batches(3)
    config = PruneConfig(sparsity=0.5, scope="matrix")
    dsee_scale.prune(swept, config, data)
    dsee_scale.prune(model, dataclasses.replace(config, block_steps=6), data)
    here, there = (dict(each.model.layers[0].named_parameters()) for each in (model, swept))
    for name, weight in here.items():
        assert torch.equal(weight, there[name]) == ("self_attn" not in name or "proj.weight" not in name), (
            name
        )


def test_tf32_is_off_while_it_solves_and_on_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is set as transformers' `tf32=True` does."""
    matmul, seen, solve = torch.backends.cuda.matmul, [], sweep.solve_pieces

    def solving(*given: Any) -> Any:
        seen.append(matmul.fp32_precision)
        return solve(*given)

    monkeypatch.setattr(sweep, "solve_pieces", solving)
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        dsee_scale.prune(make("everything"), HALF, batches(2))
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
    assert seen and set(seen) == {"ieee"}
