"""What an optimizer's state is carried over with, from one machine or engine to another."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from transformers.optimization import Adafactor

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, FormatError
from dsee_scale.checkpoint.files import MANIFEST, sha256
from dsee_scale.checkpoint.training_state import STATE_FILE, load_training_state, save_training_state
from dsee_scale.partition.engine_state import open_optimizer
from tests.models import build, llama_config, token_batch
from tests.unit.test_eight_bit_moments import losses as train


def adamw(lr: float = 1e-3, **how: bool) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    """A layer with its optimizer after one step."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, **how)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def test_how_an_optimizer_computes_stays_as_the_run_has_it() -> None:
    """A fused AdamW wants its step counts on the GPU, a plain one on the host: neither may become the other."""
    saved = open_optimizer(*adamw(fused=True, lr=3e-4)).groups()
    layer, optimizer = adamw()
    assert open_optimizer(layer, optimizer).put_groups(
        [{**saved[0], "fused": True}]
    )  # as older checkpoints say
    assert not optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] == 3e-4
    assert not {"fused", "foreach", "capturable", "differentiable"} & saved[0].keys()


class FusedAdam(torch.optim.Optimizer):
    """The bookkeeping of DeepSpeed's (0.19.8), which counts in the last parameter's state alone."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("step", 0)
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"] = group["step"]
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] += 1
            for param in group["params"]:
                mean, square = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
                mean.lerp_(param.grad, 0.1)
                square.lerp_(param.grad**2, 0.001)
                unbiased = (square / (1 - 0.999 ** state["step"])).sqrt() + 1e-8
                param.addcdiv_(mean / (1 - 0.9 ** state["step"]), unbiased, value=-group["lr"])


class ApexAdam(torch.optim.Optimizer):
    """The bookkeeping of apex's FusedAdam, which counts in the group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg"].lerp_(param.grad, 0.1)
                param.add_(state["exp_avg"] / (1 - 0.9 ** group["step"]), alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
    "FusedAdam": lambda params: FusedAdam(params, lr=1e-2),
    "ApexAdam": lambda params: ApexAdam(params, lr=1e-2),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "transformers' Adafactor": lambda params: Adafactor(params, lr=1e-2, relative_step=False),
}


def adapted(folder: Path | None = None, trained: tuple[str, ...] = ()) -> torch.nn.Module:
    model = build(llama_config())
    if folder is None:
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, trained_modules=trained))
    else:
        dsee_scale.load_adapter(model, folder)
    return model


def begun(
    folder: Path, name: str, steps: int = 3, trained: tuple[str, ...] = ()
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model that has trained, its optimizer, and their saved state."""
    model = adapted(trained=trained)
    optimizer = OPTIMIZERS[name](dsee_scale.trainable_parameters(model))
    train(model, optimizer, range(steps))
    save_training_state(model, folder, optimizer=optimizer)
    return model, optimizer


def resumed(folder: Path, name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = adapted(folder)
    optimizer = OPTIMIZERS[name](dsee_scale.trainable_parameters(model))
    load_training_state(model, folder, optimizer=optimizer)
    return model, optimizer


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a saved state's record, and the manifest with it."""
    path, manifest = folder / STATE_FILE, json.loads((folder / MANIFEST).read_text())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    manifest["files"][STATE_FILE] |= {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("trained", [(), ("embed_tokens",)], ids=["adapters", "a matrix too"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_with_what_any_optimizer_keeps_or_is_not_saved(tmp_path, name, trained):
    if trained and "Adafactor" in name:
        found = r"Adafactor keeps (row_var|exp_avg_sq_row) of shape \(\d+,.*\) .*for .* of shape \(\d+, \d+\)"
        with pytest.raises(ConfigError, match=rf"{found}, expected .*; use another optimizer, e.g. AdamW"):
            begun(tmp_path / "state", name, trained=trained)
        assert not (tmp_path / "state").exists()
        return
    straight = begun(tmp_path / "state", name, trained=trained)
    after = resumed(tmp_path / "state", name)
    for (_, one), (_, other) in zip(straight[1].state.items(), after[1].state.items(), strict=True):
        kinds = [
            {key: (type(v), getattr(v, "dtype", None), getattr(v, "shape", None)) for key, v in state.items()}
            for state in (one, other)
        ]
        assert kinds[0] == kinds[1]
    assert train(*after, range(3, 6)) == train(*straight, range(3, 6))


def test_a_parameter_without_state_has_none_after_a_resume(tmp_path):
    model = adapted(trained=("embed_tokens",))
    optimizer = OPTIMIZERS["SGD"](dsee_scale.trainable_parameters(model))
    embedding = model.model.embed_tokens.weight
    embedding.register_hook(lambda grad: torch.zeros_like(grad))
    ids = token_batch()
    model(ids, labels=ids).loss.backward()
    embedding.grad = None
    optimizer.step()
    save_training_state(model, tmp_path / "state", optimizer=optimizer)
    again, after = resumed(tmp_path / "state", "SGD")
    assert not after.state[again.model.embed_tokens.weight]
    others = [param for param in dsee_scale.trainable_parameters(again) if param.dim() == 1]
    assert others and all(after.state[param]["momentum_buffer"].any() for param in others)


def test_a_fused_adams_count_is_its_groups(tmp_path):
    begun(tmp_path / "state", "FusedAdam")
    assert set(json.loads((tmp_path / "state" / STATE_FILE).read_text())["steps"].values()) == {3}
    model, optimizer = resumed(tmp_path / "state", "AdamW")
    assert {float(state["step"]) for state in optimizer.state.values()} == {3}
    train(model, optimizer, range(3, 4))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_state_saved_before_it_named_what_has_one_still_loads(tmp_path, name):
    straight = begun(tmp_path / "state", name)

    def older(values: dict[str, Any]) -> None:
        for key in ("kept", "scalars", "optimizer"):
            del values[key]

    rewrite(tmp_path / "state", older)
    assert train(*resumed(tmp_path / "state", name), range(3, 6)) == train(*straight, range(3, 6))


@pytest.mark.parametrize(
    "change",
    [
        {"kept": {"nothing.there": {}}},
        {"kept": {"model.layers.0.self_attn.q_proj.dsee_flat": {"step": "3"}}},
        {"kept": {"model.layers.0.self_attn.q_proj.dsee_flat": {"other": 3}}},
        {"kept": [], "scalars": {}},
        {"scalars": {"step": "nn"}},
    ],
)
def test_a_damaged_record_of_what_has_state_is_refused(tmp_path, change):
    begun(tmp_path / "state", "AdamW", steps=1)
    rewrite(tmp_path / "state", lambda values: values.update(change))
    with pytest.raises(FormatError, match=r"is damaged: key '(kept|scalars)'"):
        resumed(tmp_path / "state", "AdamW")


@pytest.mark.parametrize(
    "saved, keys, other",
    [
        ("SGD", "momentum_buffer", "AdamW"),
        ("AdamW", "exp_avg, exp_avg_sq, step", "NAdam"),
        ("AdamW", "exp_avg, exp_avg_sq, step", "SGD"),
    ],
)
def test_a_state_that_one_optimizer_alone_can_use_is_refused_by_others(tmp_path, saved, keys, other):
    begun(tmp_path / "state", saved, steps=1)
    expected = rf"of {saved} \({keys}\), of which {other} .*the optimizer of the saved run"
    with pytest.raises(FormatError, match=expected):
        resumed(tmp_path / "state", other)


class DeepSpeedEngine(torch.nn.Module):
    """What a training state asks of one at stage 0."""

    _is_gradient_accumulation_boundary = None
    global_steps = global_samples = micro_steps = skipped_steps = 0

    def __init__(self, folder: Path | None, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = adapted(folder)
        self.optimizer = torch.optim.SGD(dsee_scale.trainable_parameters(self.module), lr=1.0)
        self.lr_scheduler = make(self.optimizer)

    def gradient_accumulation_steps(self) -> int:
        return 1

    def rates(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            self.optimizer.step()
            self.lr_scheduler.step()
            found.append(self.optimizer.param_groups[0]["lr"])
        return found


class Halving:
    """A rule with a state that no checkpoint holds."""

    def __init__(self) -> None:
        self.seen = torch.ones(1)

    def __call__(self, step: int) -> float:
        return 0.5**step


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.5, 1), lr_scheduler.MultiStepLR(opt, [2])], [1]
    ),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, Halving()),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_an_engines_scheduler_goes_on_where_it_was(tmp_path, caplog, name):
    straight = DeepSpeedEngine(None, SCHEDULERS[name])
    straight.rates(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            save_training_state(straight, tmp_path / "state", overwrite=True)
    told = [record for record in caplog.records if name in record.getMessage()]
    assert len(told) == (name == "LambdaLR")
    expected = straight.rates(4)
    assert len(set(expected)) > 1
    after = DeepSpeedEngine(tmp_path / "state", SCHEDULERS[name])
    load_training_state(after, tmp_path / "state")
    assert after.rates(4) == expected


@pytest.mark.parametrize("name", ["StepLR", "MultiStepLR", "SequentialLR"])
def test_a_scheduler_saved_as_plain_json_still_loads(tmp_path, name):
    straight = DeepSpeedEngine(None, SCHEDULERS[name])
    straight.rates(1)
    save_training_state(straight, tmp_path / "state")

    def older(values: dict[str, Any]) -> None:
        del values["lr_scheduler"]
        values["scheduler"] = json.loads(json.dumps(straight.lr_scheduler.state_dict()))

    rewrite(tmp_path / "state", older)
    after = DeepSpeedEngine(tmp_path / "state", SCHEDULERS[name])
    load_training_state(after, tmp_path / "state")
    assert after.rates(4) == straight.rates(4)


def test_a_scheduler_that_cannot_go_on_is_told(tmp_path, caplog):
    straight = DeepSpeedEngine(None, SCHEDULERS["StepLR"])
    straight.lr_scheduler.rule = abs
    save_training_state(straight, tmp_path / "state")
    assert "lr_scheduler StepLR.rule is a builtin" in caplog.text
    del straight.lr_scheduler.rule
    save_training_state(straight, tmp_path / "state", overwrite=True)
    load_training_state(DeepSpeedEngine(tmp_path / "state", SCHEDULERS["MultiStepLR"]), tmp_path / "state")
    assert "state of lr_scheduler StepLR, not of MultiStepLR, which begins anew" in caplog.text
