"""TRL's GRPOTrainer takes the base behind the adapters for its reference model, and loads no second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig
from tests.dist.run_inputs import SUBJECTS, write_inputs

trl = pytest.importorskip("trl")


def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def test_grpo_measures_its_distance_to_the_base_behind_the_adapters(tmp_path: Path):
    write_inputs(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, support="magnitude"))
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model,
        short,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": f"the {word} is"} for word in SUBJECTS]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        callbacks=[DSEECallback()],
    )
    calls = []

    def reference(**inputs: Any) -> Any:
        with dsee_scale.adapters_disabled(trainer.model):
            calls.append(torch.is_grad_enabled())
            return trainer.model(**inputs)

    assert trainer.ref_model is None
    trainer.beta, trainer.ref_model = 0.04, reference
    trainer.train()
    distances = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    # A freshly injected model is its base bit for bit; once trained it is not, and the base has stayed.
    assert distances[0] == 0 and distances[-1] > 0
    assert calls and not any(calls)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in base.items())
