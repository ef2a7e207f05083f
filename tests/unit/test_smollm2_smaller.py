"""SmolLM2 itself made smaller, where its weights are (`python examples/demo/demo_inputs.py`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.recipe.parsing import cache_folder

FOLDER = cache_folder() / "smollm2-135m-instruct"
STOCK = """
import json, sys, torch
sys.modules["dsee_scale"] = None  # any import of it fails
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save([model(ids).logits, model.double()(ids).logits], sys.argv[3])
print(sum(param.numel() for param in model.parameters()))
"""


@pytest.mark.skipif(not FOLDER.is_dir(), reason="SmolLM2 is not in the cache folder")
def test_smollm2_without_a_third_of_the_heads_and_a_quarter_of_the_neurons(tmp_path):
    """Stock transformers, in a Python that cannot import dsee_scale, gives the zeroed model's logits.

    Hidden states of this model reach 5,000, so that float32 alone moves its logits by 2e-3: the same weights are
    shown to be the same function in float64, and float32 to be as near to it as the zeroed model is.
    """
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    config = [
        PruneConfig(pattern="heads", num_per_layer=3, score="W"),
        PruneConfig(pattern="neurons", num_per_layer=384, score="W"),
    ]
    dsee_scale.prune(model, config)
    report = dsee_scale.export_model(model, tmp_path / "small")
    assert report.loads_with == "transformers" and report.num_removed == 30 * (512 + 3 * 384) * 576
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    words = [str(tmp_path / "small"), json.dumps(ids.tolist()), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", STOCK, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == report.num_parameters == 134_515_008 - report.num_removed
    found, found_double = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        single, double = model(ids).logits, model.double()(ids).logits
    torch.testing.assert_close(found_double, double, atol=1e-9, rtol=0)
    rounding = (single - double).abs().max()
    assert (found - double).abs().max() < 3 * rounding < 0.02
