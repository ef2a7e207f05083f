"""One process under ZeRO-3 on a device: inject, train, prune, save, resume, export; prints what came out as JSON.

python -m torch.distributed.run --nproc_per_node 1 tests/gpu/zero3_smoke.py cuda 2:4 FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

CASES: dict[str, list[dict[str, Any]]] = {
    "refit": [{"sparsity": 0.5}],
    "wanda": [{"sparsity": 0.5, "refit": False}],
    "global": [{"sparsity": 0.5, "score": "WABS"}],
    "2:4": [{"pattern": "2:4"}],
    "units": [{"pattern": "heads", "num_per_layer": 2}, {"pattern": "neurons", "num_per_layer": 12}],
    "inputs on the CPU": [{"sparsity": 0.5, "inputs_on_cpu": True}],
    "offload": [{"sparsity": 0.5}],
}
DEVICE_TARGETS = ("q_proj", "v_proj", "down_proj")


def main(device: str, case: str, folder: Path) -> None:
    """Run one case and print its losses, zeros and logits."""
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    from transformers import AutoModelForCausalLM

    import dsee_scale
    from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
    from tests.models import build, llama_config, zero3_config
    from tests.unit.test_calibrate import batches

    if device == "cuda":
        torch.cuda.set_device(0)
    if (
        device == "cpu"
    ):  # one process has no one to share memory with, and building the operator takes a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    zero = (
        {
            "offload_param": {"device": "cpu"},
            "offload_optimizer": {"device": "cpu"},
            "stage3_param_persistence_threshold": 5000,  # q, k, v and o stay on the GPU, the others don't
        }
        if case == "offload"
        else {}
    )
    config = zero3_config(**zero)
    if case == "offload":
        del config["optimizer"]["params"]["torch_adam"]
    data = [{key: value.to(device) for key, value in batch.items()} for batch in batches(6)]

    def engine_of(saved: Path | None) -> Any:
        model = build(
            llama_config(
                hidden_size=64,
                intermediate_size=96,
                num_attention_heads=4,
                head_dim=16,
                num_key_value_heads=4,
            )
        )
        if saved is None:
            dsee_scale.inject(
                model, dsee_scale.DSEEConfig(rank=4, num_sparse=8, target_modules=DEVICE_TARGETS)
            )
        else:
            base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
            model.load_state_dict(base.state_dict())
            dsee_scale.load_adapter(model, saved)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=dsee_scale.trainable_parameters(model), config=config
        )
        return engine

    def train(engine: Any, steps: int) -> list[float]:
        losses = []
        engine.train()
        for step in range(steps):
            loss = engine(**data[step], labels=data[step]["input_ids"], use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    engine = engine_of(None)
    losses = train(engine, 3)
    prunings = [dsee_scale.PruneConfig(**each) for each in CASES[case]]
    report = dsee_scale.prune(engine, prunings, data)
    dsee_scale.export_model(engine, folder / "base", delta="none")
    losses += train(engine, 2)
    save_training_state(engine, folder / "state")
    after = train(engine, 2)
    resumed = engine_of(folder / "state")
    load_training_state(resumed, folder / "state")
    # Sums on a GPU and the CPU optimizer of an offloaded run round in no fixed order.
    assert all(abs(a - b) < 1e-4 for a, b in zip(train(resumed, 2), after, strict=True)), (
        "resumed as if nothing was"
    )
    dsee_scale.export_model(engine, folder / "model")
    ids = data[0]["input_ids"]
    engine.eval()
    with torch.no_grad():
        live = engine(input_ids=ids, use_cache=False).logits.float().cpu()
        stock = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)(ids.cpu()).logits
    distance = float((live - stock).norm() / live.norm())
    print("RESULT " + json.dumps({"losses": losses + after, "removed": report.removed, "distance": distance}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
