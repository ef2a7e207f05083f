"""The weights as they are trained, one at a time, are those that an export would write."""

from __future__ import annotations

import pytest
import torch

from dsee_scale.export.export import export_model, merged_weights
from tests.models import gpt2_config, llama_config
from tests.unit.test_export import read_weights, tuned


@pytest.mark.parametrize("mask_update", [True, False])
@pytest.mark.parametrize(("name", "config"), [("llama", llama_config()), ("gpt2", gpt2_config())])
def test_merged_weights_are_those_of_the_export_as_trained(tmp_path, name, config, mask_update):
    model = tuned(config, name, mask_update=mask_update)
    export_model(model, tmp_path / "out", delta="masked" if mask_update else "dense")
    expected, found = read_weights(tmp_path / "out"), dict(merged_weights(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
