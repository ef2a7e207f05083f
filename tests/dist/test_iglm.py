"""GPT-2's fused q and v on genuine weights: IgLM, if its package is installed (its licence is non-commercial).

pip download --no-deps iglm==0.1.0, unzip it, and put the folder on PYTHONPATH
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from tests.models import partition, zero3_config

FOUND = importlib.util.find_spec("iglm")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs the package iglm")

# Variable regions of trastuzumab, a published therapeutic antibody.
HEAVY = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQ"
HEAVY += "MNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
CONFIG = DSEEConfig(
    rank=8, alpha=32, num_sparse=64, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")}
)


def tokens(folder: Path, chain: str, sequence: str) -> torch.Tensor:
    words = (folder / "vocab.txt").read_text().split()
    names = [f"[{chain}]", "[HUMAN]", *sequence, "[SEP]"]
    return torch.tensor([[words.index(name) for name in names]])


def perplexity(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def tune_backwards(folder: str) -> dict[str, float]:
    """Tune on the sequences read from their end, which the model has never seen; perplexities on the way."""
    import deepspeed

    models = Path(folder)
    torch.manual_seed(0)
    config = zero3_config()
    model = AutoModelForCausalLM.from_pretrained(models / "IgLM-S", dtype=torch.float32)
    model = partition(model.eval(), config)
    dsee_scale.inject(model, CONFIG)
    config["optimizer"]["params"]["lr"] = 5e-3
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=dsee_scale.trainable_parameters(model), config=config
    )
    engine.eval()
    forwards = tokens(models, "HEAVY", HEAVY)
    backwards = [tokens(models, "HEAVY", HEAVY[::-1]), tokens(models, "LIGHT", LIGHT[::-1])]
    found = {"forwards": perplexity(engine, forwards), "before": perplexity(engine, backwards[0])}

    def train(steps: int) -> None:
        for step in range(steps):
            ids = backwards[step % 2]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()

    train(60)
    found["tuned"] = perplexity(engine, backwards[0])
    dsee_scale.prune(engine, PruneConfig(sparsity=0.2, score="WABS"))
    found["pruned"] = perplexity(engine, backwards[0])
    train(30)
    found["retuned"] = perplexity(engine, backwards[0])
    layers = adapted_layers(model)
    found["slices"] = sum(len(layer.dsee_spec.slices) for layer in layers.values())
    return found


def test_query_and_value_inside_c_attn_learn_under_zero3(pools):
    assert FOUND is not None and FOUND.submodule_search_locations
    folder = Path(FOUND.submodule_search_locations[0]) / "trained_models"
    one, two = pools(2).run(tune_backwards, str(folder))
    assert one == two
    assert one["slices"] == 3 * 2
    assert one["forwards"] < 4 < 8 < one["before"]
    assert one["tuned"] < 0.7 * one["before"]
    assert one["retuned"] < one["pruned"]
    print({name: round(value, 2) for name, value in one.items()})
