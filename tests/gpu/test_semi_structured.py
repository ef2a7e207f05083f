"""2:4 weights through PyTorch's semi-structured kernels."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import PruneConfig
from tests.models import build, llama_config, token_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_exported_2_4_weight_is_accepted_and_gives_the_same_logits(tmp_path):
    sizes = dict(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512
    )
    model = build(llama_config(**sizes), torch.bfloat16)
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    dsee_scale.export_model(model, tmp_path / "out")
    dense = dsee_scale.load_pretrained(tmp_path / "out", device="cuda")
    sparse = dsee_scale.load_pretrained(tmp_path / "out", device="cuda", semi_structured=True)
    converted = [
        m for m in sparse.modules() if type(getattr(m, "weight", None)).__name__.startswith("Sparse")
    ]
    assert len(converted) == 14
    ids = token_batch(batch=8, length=64).cuda()
    with torch.no_grad():
        found, expected = sparse(ids).logits.float(), dense(ids).logits.float()
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
