"""Settings that save memory are refused by name where they contradict each other."""

from __future__ import annotations

import pytest
import torch

from dsee_scale import ConfigError
from dsee_scale.recipe import checks, sections
from dsee_scale.recipe.checks import from_bitsandbytes, reject_unsupported
from dsee_scale.recipe.recipe import build_recipe
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import quantization_config

DATA = {"task": "language_modelling", "train_file": "text.txt"}


def test_quantization_takes_transformers_own_names():
    model = ModelConfig(name="m", quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    config = quantization_config(model.quantization, torch.bfloat16)
    assert config.quantization_method() == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    named = quantization_config({**model.quantization, "bnb_4bit_compute_dtype": "float32"}, torch.bfloat16)
    assert named.bnb_4bit_compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_in_4bits": True}, "unknown key 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "set one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "'int4' is unknown; valid: nf4, fp4"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "keeps 16-bit weights"),
    ],
)
def test_a_wrong_quantization_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(name="m", quantization=values)


def test_bitsandbytes_missing_names_the_extra(monkeypatch):
    for module in (checks, sections):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for values in (
        {"model": {"name": "m", "quantization": {"load_in_8bit": True}}, "data": DATA},
        {"model": {"name": "m"}, "data": DATA, "training": {"optim": "paged_adamw_8bit"}},
    ):
        with pytest.raises(ConfigError, match=r"bitsandbytes.*pip install 'dsee_scale\[quant\]'"):
            build_recipe(values)


@pytest.mark.parametrize("optim", ["ademamix", "paged_ademamix_8bit"])
def test_an_optimizer_whose_moments_no_checkpoint_holds_is_refused_before_any_work(optim):
    values = {"model": {"name": "m"}, "data": DATA, "training": {"optim": optim}}
    with pytest.raises(
        ConfigError, match=rf"optim '{optim}' keeps two moments in one tensor.*adamw_bnb_8bit"
    ):
        build_recipe(values)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_param": {"device": "nvme"}}, 'offload_param to NVMe.*"device": "cpu"'),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer to NVMe saves nothing.*megabytes"),
    ],
)
def test_nvme_is_refused_before_any_work(zero, message):
    with pytest.raises(ConfigError, match=message):
        reject_unsupported({"zero_optimization": {"stage": 3, **zero}}, "adamw_torch", "ds.json")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"compile": {"deepcompile": True}}, "compile.deepcompile.*on CUDA only.*leave it out"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.*AutoEP.*the model's own experts"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size.*whole sequences.*loop of your own"),
    ],
)
def test_deepcompile_expert_parallelism_and_ulysses_are_refused_before_any_work(setting, message):
    with pytest.raises(ConfigError, match=message):
        reject_unsupported({"zero_optimization": {"stage": 3}, **setting}, "adamw_torch", "ds.json")


@pytest.mark.parametrize(
    "optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_bnb_8bit"]
)
def test_an_optimizer_that_deepspeed_would_replace_is_refused(optim):
    with pytest.raises(ConfigError, match=rf"{optim}.*runs DeepSpeed's own CPU Adam"):
        reject_unsupported({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, optim, "ds.json")
    with pytest.raises(ConfigError, match=rf"section optimizer takes the place of training.optim '{optim}'"):
        reject_unsupported({"zero_optimization": {}, "optimizer": {"type": "AdamW"}}, optim, "ds.json")
    reject_unsupported({"zero_optimization": {"stage": 3}}, optim, "ds.json")
    reject_unsupported(
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "adamw_torch", "ds.json"
    )


@pytest.mark.parametrize(
    "name", ["adamw_bnb_8bit", "lion_32bit", "ademamix", "rmsprop_bnb", "paged_adamw_32bit"]
)
def test_bitsandbytes_optimizers_are_known_by_name(name):
    assert from_bitsandbytes(name)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_8bit", "galore_adamw_8bit", "adafactor", "sgd"])
def test_optimizers_from_elsewhere_are_not_taken_for_theirs(name):
    assert not from_bitsandbytes(name)
