"""Other people's stacks on real ZeRO-3 ranks: PEFT folders in and out, a stock Trainer with the callback."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEECallback, PruneConfig, adapters_disabled
from dsee_scale.export.lora import export_lora
from dsee_scale.partition import unwrap
from tests.dist.run_inputs import stock_trainer, tiny_recipe
from tests.dist.test_inject_prune import engine_for, make, whole_weights
from tests.dist.test_run import run_recipe
from tests.models import build, llama_config, partition, token_batch, zero3_config
from tests.unit.test_export import read_weights
from tests.unit.test_trainer_callback import CONFIG

LONG = 240.0


def exported(family: str, folder: str, world_size: int) -> dict[str, Any]:
    """A LoRA of a live engine after a pruning of heads; how often a whole weight was streamed before."""
    ds_config = zero3_config()
    engine = engine_for(make(family, torch.float32, ds_config), ds_config)
    cls, streamed = type(dsee_scale.partition.open_partition(engine)), []
    original = cls.gather_each

    def counted(self: Any, params: Any, dst: int = 0) -> Any:
        streamed.extend(params)
        return original(self, params, dst)

    cls.gather_each = counted  # type: ignore[method-assign]
    try:
        report = export_lora(engine, f"{folder}/{family}-{world_size}", base="the/base")
    finally:
        cls.gather_each = original  # type: ignore[method-assign]
    ids = token_batch()
    before = engine(ids).logits.detach().clone()
    with torch.no_grad(), adapters_disabled(engine):
        frozen = engine(ids).logits.clone()
    return {
        "report": report.to_dict() | {"folder": ""},
        "streamed": len(streamed),
        "frozen": frozen,
        "live": before,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_of_an_engine_is_that_of_the_whole_model_and_no_base_weight_is_gathered(
    pools, tmp_path, family
):
    model = make(family, torch.float32, None)
    expected = export_lora(model, tmp_path / "whole", base="the/base").to_dict() | {"folder": ""}
    with torch.no_grad(), adapters_disabled(model):
        frozen = model(token_batch()).logits
    for found in pools(2).run(exported, family, str(tmp_path), 2):
        assert found["report"] == expected and found["streamed"] == 0
        torch.testing.assert_close(found["frozen"], frozen, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found["frozen"], found["live"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / f"{family}-2" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def loaded(folder: str, num_sparse: int) -> torch.Tensor:
    ds_config = zero3_config()
    model = partition(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), ds_config)
    dsee_scale.load_adapter(model, f"{folder}/lora", num_sparse=num_sparse)
    engine = engine_for(model, ds_config)
    loss = engine(token_batch(), labels=token_batch()).loss
    engine.backward(loss)
    engine.step()
    with torch.no_grad():
        return torch.stack([loss.detach(), engine(token_batch(), labels=token_batch()).loss])


def test_a_peft_folder_goes_on_under_zero_3(pools, tmp_path):
    model = build(llama_config()).eval()
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for key, param in peft.named_parameters():
            if "lora_B" in key:
                param.normal_(std=0.05)
        expected = peft(token_batch(), labels=token_batch()).loss
    peft.save_pretrained(tmp_path / "lora")
    for found in pools(2).run(loaded, str(tmp_path), 4):
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
        assert found[1] < found[0]


def test_a_recipe_may_end_in_a_lora_on_its_pruned_base(inputs, pools, tmp_path):
    changes = {"prune__mask_update": False, "prune__refit": False}
    export = {"delta": "separate", "adapter_format": "peft"}
    pools(2).run(run_recipe, tiny_recipe(inputs, tmp_path / "run", export=export, **changes), timeout=LONG)
    folder = tmp_path / "run" / "model"
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    weights = [weight for name, weight in base.named_parameters() if "_proj" in name]
    assert sum(int((weight == 0).sum()) for weight in weights) == sum(w.numel() for w in weights) // 2
    peft = PeftModel.from_pretrained(base, folder)
    again = AutoModelForCausalLM.from_pretrained(inputs / "model")
    dsee_scale.load_adapter(again, tmp_path / "run" / "adapter")
    ids = token_batch(vocab=20)
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, again.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def trained(base: str, output: str, batch: int, checkpoint: str | None) -> dict[str, Any]:
    """A stock Trainer on a pool's rank."""
    ids = torch.arange(48 * 10).view(48, 10) * 7 % 97
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = dict(output_dir=output, max_steps=6, save_steps=2, logging_steps=1, learning_rate=1e-2, seed=3)
    settings |= dict(per_device_train_batch_size=batch)
    with stock_trainer(base, checkpoint, CONFIG, rows, DSEECallback(PruneConfig(), 3), **settings) as trainer:
        trainer.train(resume_from_checkpoint=checkpoint)
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"losses": history, "weights": whole_weights(unwrap(trainer.model_wrapped))}


def test_a_stock_trainer_prunes_on_two_ranks_with_exact_zeros_and_resumes_on_one(pools, tmp_path):
    build(llama_config()).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    output = tmp_path / "run"
    first = pools(2).run(trained, str(tmp_path / "base"), str(output), 6, None, timeout=LONG)[0]
    refitted = read_weights(output / "base")
    pruned = [name for name, value in refitted.items() if (value == 0).any()]
    assert len(pruned) == 14
    for name in pruned:  # frozen since: the zeros too
        assert torch.equal(first["weights"][name], refitted[name]), name
    gone = sum(int((refitted[name] == 0).sum()) for name in pruned)
    assert gone == sum(refitted[name].numel() for name in pruned) // 2
    sizes = {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in output.glob("checkpoint-*")}
    trained_entries = json.loads((output / "checkpoint-4" / "dsee_state.json").read_text())["parameters"]
    masks = sum(refitted[name].numel() for name in pruned) / 8
    assert set(sizes) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert all(size < 16 * sum(trained_entries.values()) + masks + 100_000 for size in sizes.values())
    checkpoint = str(output / "checkpoint-4")
    again = pools(1).run(trained, str(output / "base"), str(output), 12, checkpoint, timeout=LONG)[0]
    assert again["losses"][-2:] == pytest.approx(first["losses"][-2:], rel=1e-4)
    for name in pruned:
        assert torch.equal(again["weights"][name], refitted[name]), name
