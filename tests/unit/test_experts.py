"""Fused experts: each expert's matrix under an address of its own, and what passes do with it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import CalibrationError, ConfigError, DSEEConfig, FormatError, PruneConfig, TargetError
from dsee_scale.adapters.matrices import Matrix, expert_layout, find_matrices
from dsee_scale.algorithms.delta import delta_block
from dsee_scale.algorithms.refit import sparsegpt
from dsee_scale.algorithms.sweep import Count
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.export.export import export_model, merged_weights
from dsee_scale.export.folder_report import inspect_folder
from dsee_scale.passes.calibrate import LEAST_TOKENS
from tests.models import build, llama_config, moe_config, token_batch

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


def fill_adapters(model: Any) -> None:
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "dsee" in name:
            torch.nn.init.normal_(param, std=0.1)


def with_update(matrix: Matrix) -> torch.Tensor:
    """W + D as it is stored."""
    if not matrix.adapted:
        return matrix.of(matrix.param).detach()
    delta = matrix.delta(matrix.adapter.dsee_flat)
    return (matrix.of(matrix.param) + delta_block(delta, 0, matrix.shape[0])).detach()


def routed(model: Any, batches: list[torch.Tensor]) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """What each expert got and gave, by its place: tokens, what lies between its matrices, output, gate values."""
    calls: dict[str, list[Any]] = {name: [] for name in expert_modules(model)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
        for name, module in expert_modules(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    matrices, found = find_matrices(model, shapes), {}
    for name, module in expert_modules(model).items():
        layout = expert_layout(module)
        x, chosen, gates = (torch.cat([call[i] for call in calls[name]]) for i in range(3))
        for expert in range(len(module.down_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            first, last = (matrices[f"{name}.{expert}.{each}"] for each in (layout.up, layout.down))
            w_up, w_down = (with_update(m).T if m.transposed else with_update(m) for m in (first, last))
            bias = [m.bias[expert] if m.bias is not None else 0 for m in (first, last)]
            with torch.no_grad():
                between = module._apply_gate(x[token] @ w_up.T + bias[0])
                output = between @ w_down.T + bias[1]
            found[f"{name}.{expert}"] = (x[token], between, output, gates[token, place])
    return found


def batches_of(count: int, seed: int = 0) -> list[torch.Tensor]:
    return [token_batch(batch=2, length=24, seed=seed + index) for index in range(count)]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_refit_solves_each_expert_for_its_own_tokens(model_type, tmp_path):
    model, calibration = build(moe_config(model_type)), batches_of(2)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, target_modules=("experts",)))
    fill_adapters(model)
    seen = routed(model, calibration)
    first = {n: m for n, m in find_matrices(model, shapes).items() if ".0.mlp.experts." in n}
    before = {name: with_update(matrix) for name, matrix in first.items()}
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.4), calibration)
    assert report.removed == round(0.4 * report.total)
    for name, matrix in first.items():
        place, attribute = name.rsplit(".", 1)
        x = seen[place][attribute == "down_proj"]
        whole = before[name]
        weight = whole.T.contiguous() if matrix.transposed else whole
        few = len(x) < LEAST_TOKENS
        assert (name in report.by_magnitude) == few
        gram = torch.eye(x.shape[1]) if few else x.T @ x / len(x)
        expected = sparsegpt(weight, gram, Count(round(0.4 * weight.numel()))).weight
        gone = matrix.of(matrix.param) == 0
        found = with_update(matrix).masked_fill(gone, 0)
        assert torch.equal(gone.T if matrix.transposed else gone, expected == 0)
        torch.testing.assert_close(found.T if matrix.transposed else found, expected, atol=1e-4, rtol=1e-3)
        if few:
            torch.testing.assert_close(found[~gone], whole[~gone])
    for adapter in {m.param_name: m.adapter for m in first.values()}.values():
        flat, weight = adapter.dsee_flat, adapter.weight.flatten(0, 1)
        _, b, values = adapter.dsee_spec.split(flat)
        assert b.any() and not values.any()
        assert (weight[adapter.dsee_rows.long(), adapter.dsee_cols.long()] != 0).all()
    assert {len(each[0]) < LEAST_TOKENS for each in seen.values()} == {True, False}
    fill_adapters(model)
    expected = model.eval()(calibration[0]).logits
    export_model(model, tmp_path / "model")
    export_model(model, tmp_path / "base", delta="none")
    save_adapter(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    for each in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), again):
        torch.testing.assert_close(each.eval()(calibration[0]).logits, expected, atol=1e-4, rtol=1e-4)


def test_one_experts_matrix_can_be_refitted_and_the_others_keep_their_updates():
    model = build(moe_config("qwen3_moe"))
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, target_modules=("experts",)))
    fill_adapters(model)
    matrices = {n: m for n, m in find_matrices(model, shapes).items() if m.expert is not None}
    before = {name: with_update(matrix) for name, matrix in matrices.items()}
    chosen = "layers.1.mlp.experts.3.down_proj"
    dsee_scale.prune(model, PruneConfig(modules=(chosen,)), batches_of(8))
    changed = {
        name for name, matrix in matrices.items() if not torch.equal(with_update(matrix), before[name])
    }
    assert changed == {f"model.{chosen}"}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_wanda_takes_the_norms_of_each_experts_own_tokens(model_type):
    model = build(moe_config(model_type))
    batches = batches_of(2)
    seen, matrices = routed(model, batches), find_matrices(model, shapes)
    before = {n: m.of(m.param).clone() for n, m in matrices.items() if m.expert is not None}
    config = PruneConfig(sparsity=0.4, refit=False, modules=("*.experts.*",))
    report = dsee_scale.prune(model, config, batches)
    few = []
    for name, weight in before.items():
        matrix = matrices[name]
        place = name.rpartition(".")[0]
        inputs = seen[place][0] if matrix.attribute.endswith("up_proj") else seen[place][1]
        weight_OI = weight.T if matrix.transposed else weight
        norms = (
            inputs.square().mean(0).sqrt() if len(inputs) >= LEAST_TOKENS else torch.ones(weight_OI.shape[1])
        )
        few += [] if len(inputs) >= LEAST_TOKENS else [name]
        scores = weight_OI.abs() * norms
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone.scatter_(1, scores.argsort(1)[:, : round(0.4 * scores.shape[1])], True)
        found = matrix.of(matrix.param)
        assert torch.equal((found.T if matrix.transposed else found) == 0, gone), name
    assert report.by_magnitude == tuple(few) and 0 < len(few) < len(before)
    assert "too few calibration tokens reached model.layers.0.mlp.experts." in str(report)


def test_statistics_of_experts_are_read_back_as_they_were(tmp_path):
    found = dsee_scale.calibrate(build(moe_config("mixtral")), batches_of(2))
    found.save(tmp_path / "statistics")
    again = dsee_scale.Statistics.load(tmp_path / "statistics")
    assert again.gated == found.gated and len(found.gated) == 2 and again.tokens == found.tokens
    found.gated[next(iter(found.gated))][1] = float("inf")
    found.save(tmp_path / "damaged")
    with pytest.raises(FormatError, match="expected non-negative sums for experts"):
        dsee_scale.Statistics.load(tmp_path / "damaged")
    assert all(torch.equal(again.squares[name], value) for name, value in found.squares.items())


@pytest.mark.parametrize("score", ["reap", "frequency", "random"])
def test_the_experts_of_lowest_score_go(score):
    model = build(moe_config("qwen3_moe"))
    batches = batches_of(3)
    seen = routed(model, batches)
    config = PruneConfig(pattern="experts", num_per_layer=2, score=score)
    report = dsee_scale.prune(model, config, None if score == "random" else batches)
    assert report.units == {f"model.layers.{i} experts": (2, 5) for i in range(2)}
    assert "4 of 10 experts are gone, in 2 layers" in str(report)
    for name, module in expert_modules(model).items():
        gone = [bool((one == 0).all()) for one in module.down_proj]
        assert sum(gone) == 2 and gone == [bool((one == 0).all()) for one in module.gate_up_proj]
        if score != "random":
            scores = []
            for expert in range(5):
                tokens, _, output, gates = seen[f"{name}.{expert}"]
                scores.append(float((gates * output.norm(dim=-1)).mean()) if score == "reap" else len(tokens))
            assert {i for i in range(5) if gone[i]} == set(torch.tensor(scores).argsort()[:2].tolist())


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_without_some_experts_is_a_stock_model_with_the_same_logits(model_type, tmp_path):
    model = build(moe_config(model_type))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2, score="random"))
    whole = dsee_scale.prune(model, PruneConfig(sparsity=0.3, score="W"))
    assert whole.sparsity >= 0.3
    ids = token_batch(length=24)
    chosen: list[torch.Tensor] = []
    for module in expert_modules(model).values():
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    with torch.no_grad():
        expected = model(ids).logits
    gone = [
        {i for i, one in enumerate(module.down_proj) if bool((one == 0).all())}
        for module in expert_modules(model).values()
    ]
    assert all(
        len(each) == 2 and not each & set(c.unique().tolist()) for each, c in zip(gone, chosen, strict=True)
    )
    report = export_model(model, tmp_path / "small")
    assert report.loads_with == "transformers" and "experts cut out of" in str(report.structure)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {len(module.down_proj) for module in expert_modules(stock).values()} == {3}
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_copies_and_pickles_of_a_model_without_some_experts_choose_the_same(model_type):
    model = build(moe_config(model_type, experts=6)).eval()
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2, score="random"))
    tokens = batches_of(1)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, model(tokens).logits)
        dsee_scale.prune(twin, PruneConfig(pattern="experts", num_per_layer=3, score="random"))
        assert twin(tokens).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_layers_that_keep_unequal_numbers_are_loaded_by_load_pretrained(model_type, tmp_path):
    model = build(moe_config(model_type, experts=8))
    config = PruneConfig(pattern="experts", sparsity=0.3, scope="global", score="reap")
    report = dsee_scale.prune(model, config, batches_of(3))
    counts = [gone for gone, _ in report.units.values()]
    assert sum(counts) == 5 and counts[0] != counts[1]
    exported = export_model(model, tmp_path / "small")
    assert exported.loads_with == "dsee_scale.load_pretrained"
    small = dsee_scale.load_pretrained(tmp_path / "small")
    assert [8 - len(module.down_proj) for module in expert_modules(small).values()] == counts
    with torch.no_grad():
        ids = token_batch(length=24)
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


def test_groups_of_experts_lose_equally_many(tmp_path):
    model = build(moe_config("deepseek_v3", experts=8, n_group=2, topk_group=1))
    with pytest.raises(ConfigError, match=r"2 groups of 4 experts, which must stay equal, and 3 are to go"):
        dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=3, score="random"))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2, score="random"))
    export_model(model, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        ids = token_batch(length=24)
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


def test_removed_experts_stay_out_of_adapter_files_and_a_later_load(tmp_path):
    model = build(moe_config("qwen3_moe"))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2), batches_of(3))
    save_adapter(model, tmp_path / "adapter")
    again = build(moe_config("qwen3_moe"))
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        ids = token_batch(length=24)
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(TargetError, match=r"experts were removed.*export_model"):
        next(merged_weights(again))
    dsee_scale.prune(again, PruneConfig(pattern="experts", num_per_layer=1), batches_of(3))
    assert all(sum(bool((e == 0).all()) for e in m.down_proj) == 2 for m in expert_modules(again).values())
    assert "experts" in str(inspect_folder(tmp_path / "adapter"))


def test_gradients_reach_what_is_left_and_a_removed_expert_stays_zero():
    model = build(moe_config("qwen3_moe", output_router_logits=True))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, trained_modules=("gate",)))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2), batches_of(3))
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    ids = token_batch(length=24)
    for _ in range(2):
        loss = model(ids, labels=ids).loss  # with the router's balancing loss, over all logits
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.model.layers:
        assert sum(bool((one == 0).all()) for one in layer.mlp.experts.down_proj) == 2


@pytest.mark.parametrize("dtype, multiple, number", [(torch.float32, 4, 10), (torch.bfloat16, 8, 20)])
def test_a_number_of_neurons_that_stock_transformers_could_not_run_is_refused(dtype, multiple, number):
    model = build(moe_config("qwen3_moe", moe_intermediate_size=40), dtype)
    before = [param.clone() for param in model.parameters()]
    for how in (dict(num_per_layer=number), dict(sparsity=number / 40, scope="matrix")):
        with pytest.raises(ConfigError, match=f"leaves {40 - number} neurons .* a multiple of {multiple}"):
            dsee_scale.prune(model, PruneConfig(pattern="neurons", score="W", **how))
    assert all(map(torch.equal, model.parameters(), before))
    schedule = dsee_scale.CubicSchedule(final_sparsity=0.4, start_step=0, num_steps=3)
    for step in range(4):  # what a cut before the last one leaves is never exported
        cut = schedule.config(PruneConfig(pattern="neurons", score="W", scope="matrix"), step)
        report = dsee_scale.prune(model, cut)
    assert set(report.units.values()) == {(5 * 16, 5 * 40)}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_every_expert_loses_its_own_neurons(model_type, tmp_path):
    model = build(moe_config(model_type))
    ids = token_batch(length=24)
    with pytest.raises(ConfigError, match="scope 'global' would leave the experts"):
        dsee_scale.prune(model, PruneConfig(pattern="neurons", sparsity=0.25, score="W"))
    report = dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=4), batches_of(4))
    assert set(report.units.values()) == {(20, 60)}
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=1, score="random"))
    exported = export_model(model, tmp_path / "small")
    assert exported.loads_with == "transformers"
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {m.down_proj.numel() for m in expert_modules(small).values()} == {4 * 8 * 20}
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "config, error, text",
    [
        (
            dict(num_per_layer=3),
            ConfigError,
            r"3 of 5 experts.*at least 3, one more than the 2 that each token",
        ),
        (dict(sparsity=0.5, scope="global"), ConfigError, r"at least 3 experts in every layer only 4 can go"),
        (
            dict(num_per_layer=1, score="reap"),
            CalibrationError,
            r"'reap' looks at activations.*score='random'",
        ),
    ],
)
def test_experts_that_cannot_go_are_refused_and_nothing_changes(config, error, text):
    model = build(moe_config("qwen3_moe"))
    with pytest.raises(error, match=text):
        dsee_scale.prune(model, PruneConfig(**{"pattern": "experts", "score": "random", **config}))
    assert not any((p == 0).any() for n, p in model.named_parameters() if "experts" in n)


def test_the_pattern_is_refused_where_there_are_no_experts_and_with_other_scores():
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no experts"):
        dsee_scale.prune(build(llama_config()), PruneConfig(pattern="experts", score="random"))
    with pytest.raises(ConfigError, match=r"score 'W' does not go with pattern 'experts'"):
        PruneConfig(pattern="experts", score="W")
    with pytest.raises(ConfigError, match=r"score 'reap' does not go with pattern 'unstructured'"):
        PruneConfig(score="reap", sparsity=0.5)
    with pytest.raises(TargetError, match=r"heads of gpt_oss can't be removed: each head has a sink"):
        dsee_scale.prune(build(moe_config("gpt_oss")), PruneConfig(pattern="heads", score="W"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_adapted_experts_are_scored_with_their_updates_and_cut_with_them(model_type, tmp_path):
    model = build(moe_config(model_type))
    dsee_scale.inject(
        model, DSEEConfig(rank=2, num_sparse=5, target_modules=("gate_up_proj", "down_proj", "q_proj"))
    )
    for name, param in model.named_parameters():
        if "dsee_" in name:
            torch.nn.init.normal_(param, std=0.1)
    module = next(iter(expert_modules(model).values()))
    calls: list[Any] = []
    hook = module.register_forward_hook(lambda _, args, output: calls.append((*args, output)))
    batch = token_batch(batch=2, length=24)
    statistics = dsee_scale.calibrate(model, [batch])
    hook.remove()
    (x, chosen, gates, _) = calls[0]
    expected = torch.zeros(5)
    with torch.no_grad():
        for token, place in ((t, p) for t in range(len(x)) for p in range(2)):
            alone = module(x[token : token + 1], chosen[token, place].view(1, 1), torch.ones(1, 1))
            expected[chosen[token, place]] += gates[token, place] * alone.norm()
    torch.testing.assert_close(
        torch.tensor(next(iter(statistics.gated.values()))), expected, rtol=1e-4, atol=1e-6
    )
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=4, refit=False), [batch])
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, refit=False, score="WABS", modules=("*.experts.*",)))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=1), [batch])
    b, values = (
        module.dsee_weights("")[".down_proj"].dsee_B,
        module.dsee_weights("")[".down_proj"].dsee_values,
    )
    gone = torch.tensor([bool((one == 0).all()) for one in module.down_proj])
    for update in (b, values):
        assert torch.equal((update.reshape(5, -1) == 0).all(1), gone)
    assert export_model(model, tmp_path / "small").loads_with == "transformers"
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(small(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-4)


def test_heads_of_a_model_whose_first_blocks_are_dense_load_again(tmp_path):
    model = build(moe_config("glm4_moe", moe_intermediate_size=16))
    units = [PruneConfig(pattern="heads", num_per_layer=2), PruneConfig(pattern="neurons", num_per_layer=4)]
    dsee_scale.prune(model, units, batches_of(2))
    assert export_model(model, tmp_path / "small").loads_with == "dsee_scale.load_pretrained"
    small, ids = dsee_scale.load_pretrained(tmp_path / "small"), token_batch(length=24)
    assert small.model.layers[0].self_attn.q_proj.out_features == 16
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("order", ["experts first", "experts last"])
def test_a_report_counts_every_expert_once_however_it_was_pruned(order):
    model = build(moe_config("mixtral", experts=4))
    steps = [
        PruneConfig(pattern="experts", num_per_layer=1),
        PruneConfig(sparsity=0.5, scope="matrix", refit=False),
    ]
    report = dsee_scale.prune(model, steps if order == "experts first" else steps[::-1], batches_of(3))
    matrices = {name: m for name, m in find_matrices(model, shapes).items() if ".layers." in name}
    assert report.matrices.keys() == matrices.keys()
    for name, matrix in matrices.items():
        entries = matrix.param.detach().view(-1)[matrix.offset : matrix.offset + matrix.numel]
        assert report.matrices[name] == (int((entries == 0).sum()), matrix.numel), name
    assert report.coverage is not None and report.coverage.covered == report.total
    assert not report.by_magnitude


@pytest.mark.parametrize("topk_group, least", [(2, 2), (1, 4)])
def test_a_router_keeps_as_many_experts_in_each_group_as_it_takes_from_one(topk_group, least):
    grouped = dict(experts=24, n_group=4, num_experts_per_tok=4, topk_group=topk_group)
    model = build(moe_config("deepseek_v3", **grouped))
    remove = dict(pattern="experts", score="random")
    with pytest.raises(
        ConfigError, match=f"at least {4 * least}, {least} in each of the 4 groups that its router"
    ):
        dsee_scale.prune(model, PruneConfig(num_per_layer=4 * (6 - least + 1), **remove))
    dsee_scale.prune(model, PruneConfig(num_per_layer=4 * (6 - least), **remove))
    with torch.no_grad():
        assert model(token_batch(length=24)).logits.isfinite().all()


@pytest.mark.parametrize("last", [True, False])
def test_experts_whose_outputs_are_no_numbers_are_refused_and_none_is_ranked(last):
    model = build(moe_config("mixtral", hidden_size=32, intermediate_size=16), dtype=torch.float16)
    experts = model.model.layers[-1 if last else 0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[2] = 3.0
        experts.down_proj[2] = 6e4
    before = experts.down_proj.clone()
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        dsee_scale.calibrate(model, batches_of(4))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=1), batches_of(4))
    assert torch.equal(before, experts.down_proj)


def test_a_router_without_groups_that_takes_one_expert_is_told_of_one_more():
    model = build(moe_config("qwen3_moe", num_experts_per_tok=1))
    with pytest.raises(ConfigError, match=r"at least 2, one more than the 1 that each token goes to"):
        dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=4, score="random"))
