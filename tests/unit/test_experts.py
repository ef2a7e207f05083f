"""Fused experts: each expert's matrix under an address of its own, and what passes do with it."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import PruneConfig, TargetError
from dsee_scale.adapters.matrices import expert_layout, find_matrices
from tests.models import build, moe_config

MODELS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen2_moe")


def shapes(param: torch.nn.Parameter) -> torch.Size:
    return param.shape


def expert_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    found = {name: module for name, module in model.named_modules() if expert_layout(module)}
    assert found
    return found


@pytest.mark.parametrize("model_type", MODELS)
def test_an_experts_matrices_compute_what_the_model_computes(model_type):
    model = build(moe_config(model_type))
    matrices = find_matrices(model, shapes)
    for name, module in expert_modules(model).items():
        layout = expert_layout(module)
        assert layout is not None
        x = torch.randn(3, 20)
        for expert in range(5):
            up, down = (matrices[f"{name}.{expert}.{each}"] for each in (layout.up, layout.down))
            assert up.outputs_by_inputs == (24, 20) and down.outputs_by_inputs == (20, 12)
            weights = [m.of(m.param).T if m.transposed else m.of(m.param) for m in (up, down)]
            biases = [m.bias[expert] if m.bias is not None else None for m in (up, down)]
            assert (biases[0] is not None) == layout.bias == (model_type == "gpt_oss")
            hidden = module._apply_gate(torch.nn.functional.linear(x, weights[0], biases[0]))
            expected = torch.nn.functional.linear(hidden, weights[1], biases[1])
            chosen, ones = torch.full((3, 1), expert), torch.ones(3, 1)
            torch.testing.assert_close(module(x, chosen, ones), expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_hold_most_of_the_blocks_and_are_covered(model_type):
    model = build(moe_config(model_type))
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    assert report.coverage is not None and report.coverage.share > 0.9
    assert not any("experts" in name for name in report.coverage.missed if not name.endswith("bias"))
    found = sum(int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n)
    assert found == report.removed == round(0.5 * report.total)
    assert "x gate_up_proj" in str(report)


@pytest.mark.parametrize("scope", ["global", "matrix", "row"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_each_expert_is_pruned_as_a_linear_layer_of_its_own_would_be(model_type, scope):
    model = build(moe_config(model_type))
    config = PruneConfig(sparsity=0.4, scope=scope, score="W", modules=("*.experts.*",))
    matrices = {n: m for n, m in find_matrices(model, shapes).items() if m.expert is not None}
    before = {n: m.of(m.param).clone() for n, m in matrices.items()}
    alone = torch.nn.Module()
    alone.blocks = torch.nn.ModuleList()
    for name, weight in before.items():
        by_outputs = weight.T if matrices[name].transposed else weight
        alone.blocks.append(torch.nn.Linear(*by_outputs.shape[::-1], bias=False))
        alone.blocks[-1].weight.data = by_outputs.contiguous().clone()
    dsee_scale.prune(alone, PruneConfig(sparsity=0.4, scope=scope, score="W"))
    report = dsee_scale.prune(model, config)
    assert len(report.matrices) == 2 * 5 * 2 == len(alone.blocks)
    for (name, matrix), linear in zip(matrices.items(), alone.blocks, strict=True):
        found = matrix.of(matrix.param)
        torch.testing.assert_close(found.T if matrix.transposed else found, linear.weight, rtol=0, atol=0)
        assert report.matrices[name] == (int((found == 0).sum()), found.numel())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_become_two_of_four_along_their_inputs(model_type):
    model = build(moe_config(model_type))
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W", modules=("*.experts.*",)))
    for matrix in find_matrices(model, shapes).values():
        if matrix.expert is not None:
            weight = matrix.of(matrix.param)
            by_outputs = weight.T if matrix.transposed else weight
            kept = (by_outputs != 0).reshape(by_outputs.shape[0], -1, 4).sum(-1)
            assert bool((kept == 2).all())


def test_one_experts_matrix_can_be_named():
    model = build(moe_config("qwen3_moe"))
    report = dsee_scale.prune(
        model, PruneConfig(sparsity=0.5, score="W", modules=("layers.1.mlp.experts.3.down_proj",))
    )
    assert list(report.matrices) == ["model.layers.1.mlp.experts.3.down_proj"]
    down = model.model.layers[1].mlp.experts.down_proj
    assert [int((slice == 0).sum()) for slice in down] == [0, 0, 0, down[0].numel() // 2, 0]


def test_a_refit_of_experts_is_refused_by_name():
    model = build(moe_config("qwen3_moe"))
    batch = torch.randint(0, 97, (2, 8))
    with pytest.raises(TargetError, match=r"experts\.0\.gate_up_proj is an expert's.*refit=False"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5), [batch])
    assert not any((p == 0).any() for n, p in model.named_parameters() if "experts" in n)
