"""Quantised bases in one process: decoding, the repacking fault, pruning of codes, refusals."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig, TargetError
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.algorithms import bits
from dsee_scale.errors import FormatError
from dsee_scale.export.from_files import export_files
from dsee_scale.partition import open_partition, quantized
from dsee_scale.partition.quantized import FourBit, prepare_quantised, quantised_layers
from tests.models import build, llama_config
from tests.quantised import BATCH, DSEE, FORMATS, evaluate, injected_llama, quantised_llama, write_llama
from tests.watch import Watch

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("form", list(FORMATS))
def test_any_stretch_decodes_as_bitsandbytes_decodes_the_whole(folder, form):
    model = quantised_llama(folder, form)
    prepare_quantised(model)
    port = open_partition(model)
    for name, layer in quantised_layers(model):
        weight = layer.weight
        if form == "int8":
            expected = bnb.functional.int8_vectorwise_dequant(weight.data, layer.state.SCB).to(torch.bfloat16)
        else:
            expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert port.shape(weight) == expected.shape and port.dtype(weight) == torch.bfloat16
        assert torch.equal(port.decode(weight, weight.data), expected), name
        stored = weight.data.view(-1)
        for start, stop in ((0, 1), (7, 50), (33, stored.numel())):
            entries, first = port.codecs[id(weight)].decode(stored[start:stop], start)
            assert torch.equal(entries, expected.view(-1)[first : first + entries.numel()])


@pytest.mark.parametrize("shape", [(5, 33), (3, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_odd_number_of_entries_decodes_and_is_zeroed(shape, kind):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, state = bnb.functional.quantize_4bit(weight, quant_type=kind)
    codec = FourBit(SimpleNamespace(weight=SimpleNamespace(quant_state=state)), weight.shape, torch.float32)
    entries, first = codec.decode(stored)
    assert first == 0 and torch.equal(entries.view(shape), bnb.functional.dequantize_4bit(stored, state))
    entries[::3] = 0
    codec.zero(stored, entries)
    assert torch.equal(codec.decode(stored)[0], entries)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_accelerator_decodes_a_weight_in_one_stretch(folder, form, monkeypatch):
    model = quantised_llama(folder, form)
    prepare_quantised(model)
    weight, codecs = model.model.layers[0].mlp.up_proj.weight, open_partition(model).codecs
    monkeypatch.setattr(quantized, "CPU_CHUNK", 64)
    expected, made = codecs[id(weight)].decode(weight.data)[0], []
    for host in (True, False):
        monkeypatch.setattr(bits, "is_host", lambda device, host=host: host)
        with Watch() as watch:
            assert torch.equal(codecs[id(weight)].decode(weight.data)[0], expected)
        made.append(watch.operators)
    assert made[1] < 40 < made[0]


@pytest.mark.parametrize("form", list(FORMATS))
def test_injection_changes_no_output_and_adapters_are_in_the_compute_dtype(folder, form):
    model = quantised_llama(folder, form)
    prepare_quantised(model)
    before = evaluate(model)
    dsee_scale.inject(model, DSEE)
    assert evaluate(model) == before
    adapters = [p for n, p in model.named_parameters() if "dsee_" in n]
    assert {p.dtype for p in adapters} == {torch.bfloat16} and len(adapters) == 4
    assert all(p.requires_grad for p in adapters) and sum(p.requires_grad for p in model.parameters()) == len(
        adapters
    )


@pytest.mark.parametrize("form", ["nf4", "nf4, double, stored as bf16"])
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_evaluating_does_not_spoil_training(folder, form, evaluated_before):
    """bitsandbytes repacks 4-bit weights in an evaluation on CPUs with avx512_bf16, and then cannot train."""
    expected = evaluate_dequantised(folder, form)
    model = quantised_llama(folder, form)
    if evaluated_before:
        evaluate(model)  # not prepared yet: repacked here, where the CPU can
    dsee_scale.inject(model, DSEE)
    trained = dsee_scale.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        assert evaluate(model) < expected + 0.05
        loss = model(input_ids=BATCH, labels=BATCH).loss
        loss.backward()
        layers = adapted_layers(model).values()
        assert layers and all(m.dsee_spec.split(m.dsee_flat.grad)[1].abs().max() > 0 for m in layers)
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(model) < expected - 0.1


def evaluate_dequantised(folder: Path, form: str) -> float:
    return evaluate(quantised_llama(folder, form).dequantize())  # type: ignore[operator]


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(sparsity=0.5, score="W"),
        PruneConfig(sparsity=0.4, scope="matrix", score="WABS"),
        PruneConfig(pattern="2:4", score="W"),
        PruneConfig(sparsity=0.5, score="random"),
        PruneConfig(sparsity=0.5, refit=False),
        PruneConfig(pattern="2:4", refit=False),
    ],
)
def test_codes_are_zeroed_where_the_dequantised_weight_would_be(folder, form, config):
    model = injected_llama(folder, form)
    port = open_partition(model)
    layers = dict(quantised_layers(model))
    before = {name: port.decode(layer.weight, layer.weight.data) for name, layer in layers.items()}
    twin = copy.deepcopy(model).dequantize()
    for name, layer in layers.items():  # the deep copy is a model of its own
        assert twin.get_submodule(name).weight.dtype == torch.bfloat16 and layer.weight.dtype != torch.float32
    report = dsee_scale.prune(model, config, [{"input_ids": BATCH}])
    for name, layer in layers.items():
        after = port.decode(layer.weight, layer.weight.data)
        assert torch.equal(after[after != 0], before[name][after != 0])
        assert (int((after == 0).sum()), after.numel()) == report.matrices[name]
        plain = torch.nn.Linear(*reversed(after.shape), bias=False, dtype=torch.bfloat16)
        plain.weight.data.copy_(before[name])
        setattr(twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], plain)
    if config.score in ("W", "random"):
        dsee_scale.prune(twin, config)
        for name, layer in layers.items():
            weight = twin.get_submodule(name).weight
            assert torch.equal(port.decode(layer.weight, layer.weight.data), weight), name


def test_what_a_quantised_base_cannot_do_is_refused_by_name(folder):
    model = quantised_llama(folder, "nf4")
    with pytest.raises(TargetError, match=r"trained_modules: model.layers.0.mlp.up_proj is quantised"):
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, trained_modules=("up_proj",)))
    model = injected_llama(folder, "nf4")
    for pattern in ("heads", "neurons"):
        with pytest.raises(TargetError, match="prune an unquantised base"):
            dsee_scale.prune(model, PruneConfig(sparsity=0.5, pattern=pattern, score="W"))
    with pytest.raises(TargetError, match="is quantised, and re-fitted values would have to be rounded"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5), [{"input_ids": BATCH}])


def test_a_row_length_that_the_cpu_decodes_wrongly_is_refused():
    layer = bnb.nn.Linear4bit(160, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.to("cpu")
    stored, state = layer.weight.data, layer.weight.quant_state
    wrong = not torch.allclose(
        bnb.functional.dequantize_4bit(stored, state).view(-1),
        FourBit(layer, torch.Size((64, 160)), torch.float32).decode(stored)[0],
    )
    model = torch.nn.Sequential(layer)
    if not wrong:
        return prepare_quantised(model)
    with pytest.raises(TargetError, match=r"0 has 160 inputs.*multiple of its blocks of 64"):
        prepare_quantised(model)


def test_layers_that_are_not_quantised_yet_are_refused():
    model = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    with pytest.raises(TargetError, match="not quantised yet"):
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("0",)))
    model = torch.nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    with pytest.raises(TargetError, match="has_fp16_weight"):
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("0",)))


@pytest.mark.parametrize("form", ["nf4, double, stored as bf16", "int8"])
def test_adapter_and_masks_survive_saving_and_loading(folder, form, tmp_path):
    model = injected_llama(folder, form)
    train(model)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    again = quantised_llama(folder, form)
    evaluate(again)  # repacked on some CPUs
    dsee_scale.load_adapter(again, tmp_path / "adapter")
    prepared = quantised_llama(folder, form)
    dsee_scale.load_adapter(prepared, tmp_path / "adapter")
    assert evaluate(prepared) == evaluate(model)
    assert evaluate(again) == pytest.approx(evaluate(model), abs=0.02)  # repacking rounds the scales
    files = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert files < 60_000


@pytest.mark.parametrize("form", ["nf4", "fp4, double", "int8"])
@pytest.mark.parametrize("delta", ["masked", "dense"])
def test_export_is_the_decoded_masked_model_in_stock_transformers(folder, form, delta, tmp_path):
    model = injected_llama(folder, form)
    train(model)
    # Around the adapted matrices, so that both forms are exactly what was trained.
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=("gate_proj", "up_proj", "o_proj"), score="W"))
    report = dsee_scale.export_model(model, tmp_path / "model", delta=delta)
    name = {"fp4, double": "fp4"}.get(form, form)
    assert report.base == f"{name}, decoded to bfloat16" and 0 < report.distance < 0.004
    assert f"base: {name}" in str(report)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert getattr(plain.config, "quantization_config", None) is None and plain.dtype == torch.bfloat16
    with torch.no_grad():
        ours, theirs = model.eval()(BATCH).logits, plain(BATCH).logits
    assert (ours - theirs).abs().max() < 0.05 * ours.abs().max()
    gates = [m.weight for n, m in plain.named_modules() if n.endswith(("gate_proj", "up_proj", "o_proj"))]
    assert sum(int((w == 0).sum()) for w in gates) == report.num_zero == sum(w.numel() for w in gates) // 2


@pytest.mark.parametrize("form", ["nf4", "nf4, double, stored as bf16", "int8"])
def test_under_the_mask_the_export_of_adapted_matrices_is_what_was_trained(folder, form, tmp_path):
    model = injected_llama(folder, form)
    train(model)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=("q_proj", "v_proj"), score="W"))
    train(model)
    report = dsee_scale.export_model(model, tmp_path / "model")
    assert 0 < report.distance < 0.004 and report.num_zero == report.num_pruned // 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    layers = adapted_layers(model.eval())
    assert len(layers) == 4
    for name, layer in layers.items():
        assert layer.dsee_under_mask and torch.equal(layer(x), plain.get_submodule(name)(x)), name


def test_merging_into_the_unquantised_base_says_how_far_that_is(folder, tmp_path):
    model = injected_llama(folder, "nf4")
    train(model)
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, mask_update=False, score="W"))
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    report = export_files(tmp_path / "adapter", folder, tmp_path / "model", delta="dense")
    assert report.base == "unquantised, while nf4 was trained on"
    assert 0.02 < report.distance < 0.3  # the error of 4 bits
    exact = dsee_scale.export_model(model, tmp_path / "exact", delta="dense")
    assert exact.distance < report.distance / 10


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_supports_found_in_the_unquantised_base_carry_over(folder, tmp_path):
    """Decompose first, then quantise: inject into bfloat16, save, load into four bits."""
    exact = AutoModelForCausalLM.from_pretrained(folder)
    dsee_scale.inject(exact, DSEE)
    dsee_scale.save_adapter(exact, tmp_path / "adapter")
    model = quantised_llama(folder, "nf4")
    dsee_scale.load_adapter(model, tmp_path / "adapter")
    for name, layer in adapted_layers(exact).items():
        there = model.get_submodule(name)
        assert torch.equal(there.dsee_rows, layer.dsee_rows) and torch.equal(there.dsee_cols, layer.dsee_cols)
    before = evaluate(model)
    train(model)
    assert evaluate(model) < before - 0.05


def fp8_llama() -> torch.nn.Module:
    """A Llama whose query projections are as transformers loads FP8 checkpoints."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = build(llama_config(**sizes), torch.bfloat16).requires_grad_(False)
    for block in model.model.layers:
        layer = FP8Linear(64, 64, block_size=(32, 32)).requires_grad_(False)
        layer.weight.data.copy_(block.self_attn.q_proj.weight)
        layer.weight_scale_inv.data.fill_(0.5)
        block.self_attn.q_proj = layer
    return model


FP8 = "FP8Linear with torch.float8_e4m3fn weights.*bfloat16 version.*bitsandbytes"


@pytest.mark.parametrize(
    "settings", [dict(target_modules=("k_proj", "q_proj")), dict(trained_modules=("q_proj",))]
)
def test_an_fp8_base_is_refused_before_anything_is_computed(settings, monkeypatch):
    monkeypatch.setattr("dsee_scale.passes.inject_model.decompose_model", None)
    model = fp8_llama()
    with pytest.raises(TargetError, match=FP8 if "target_modules" in settings else "cannot be trained"):
        dsee_scale.inject(model, DSEEConfig(**{"rank": 2, "target_modules": ("k_proj",), **settings}))
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(sparsity=0.5, score="W", scope="matrix", refit=False, modules=("k_proj", "q_proj")),
        PruneConfig(pattern="2:4", score="W", refit=False, modules=("k_proj", "q_proj")),
        PruneConfig(pattern="heads", num_per_layer=2, score="W"),
    ],
)
def test_fp8_weights_are_not_pruned_and_neither_are_those_beside_them(config):
    model = fp8_llama()
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(TargetError, match="FP8Linear"):
        dsee_scale.prune(model, config)
    assert all(torch.equal(p.float(), before[name].float()) for name, p in model.named_parameters())


def test_an_fp8_base_takes_no_adapter_from_files_and_is_not_exported(tmp_path):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    plain = build(llama_config(**sizes), torch.bfloat16)
    dsee_scale.inject(plain, DSEEConfig(rank=2, num_sparse=4, support="magnitude"))
    dsee_scale.save_adapter(plain, tmp_path / "adapter")
    model = fp8_llama()
    with pytest.raises(TargetError, match=FP8):
        dsee_scale.load_adapter(model, tmp_path / "adapter")
    assert not adapted_layers(model)
    with pytest.raises(TargetError, match="float8_e4m3fn"):
        dsee_scale.export_model(model, tmp_path / "model", delta="none")


def test_an_adapter_is_not_merged_into_files_in_fp8(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    dsee_scale.inject(model, DSEE)
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="is quantised; give an unquantised base"):
        export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "model")
