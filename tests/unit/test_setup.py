"""The Trainer's arguments as a run gets them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsee_scale.errors import ConfigError
from dsee_scale.training.setup import LOCAL_RANKS, RunArguments, make_arguments, model_dtype


def test_one_process_trains_on_one_gpu(tmp_path: Path) -> None:
    """transformers would make a DataParallel of all that are in sight, with other batches and another loss."""
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert args.n_gpu == 0
    args._n_gpu = 8
    assert args.n_gpu == 1 and args.train_batch_size == 4


@pytest.mark.parametrize("with_gpu", [False, True])
def test_deepspeed_without_a_launcher_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: bool
) -> None:
    """DeepSpeed itself would ask for mpi4py."""
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    with pytest.raises(ConfigError, match="needs a launcher"):
        make_arguments({"output_dir": str(tmp_path), "deepspeed": "zero3_bf16"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights is true",
        ),
        ({"gradient_acumulation_steps": 4}, "did you mean 'gradient_accumulation_steps'"),
    ],
)
def test_a_config_that_accelerate_brings_is_looked_at_like_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, **change}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))
    with pytest.raises(ConfigError, match=message) as caught:
        make_arguments({"output_dir": str(tmp_path)})
    assert str(config) in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("perplexity", False),
        ("eval_perplexity", False),
        ("loss", False),
        ("eval_accuracy", True),
        ("bleu", True),
    ],
)
def test_the_best_checkpoint_is_the_best_of_its_metric(tmp_path: Path, metric: str, greater: bool) -> None:
    """transformers takes the greatest of all that isn't called a loss."""
    settings = {"output_dir": str(tmp_path), "metric_for_best_model": metric}
    assert make_arguments(dict(settings)).greater_is_better is greater
    assert make_arguments({**settings, "greater_is_better": greater}).greater_is_better is greater
    with pytest.raises(ConfigError, match=r"training.greater_is_better is .* the best .*; leave it out"):
        make_arguments({**settings, "greater_is_better": not greater})


@pytest.mark.parametrize(("dtype", "engine"), [(None, None), ("float32", None), (None, object())])
def test_float16_weights_need_deepspeed(dtype: str | None, engine: object) -> None:
    """The Trainer scales gradients there, and those of float16 parameters it refuses at its first step."""
    recipe: Any = SimpleNamespace(model=SimpleNamespace(dtype=dtype))
    args: Any = SimpleNamespace(fp16=True, bf16=False, deepspeed_plugin=engine)
    if dtype or engine:
        assert model_dtype(recipe, args) == (torch.float32 if dtype else torch.float16)
        return
    with pytest.raises(ConfigError, match=r"training.fp16 without DeepSpeed .* --model.dtype float32"):
        model_dtype(recipe, args)
