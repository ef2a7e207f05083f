"""What lies on more than one device: each of these failed to find its tensors together, and a CPU cannot show it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dsee_scale
from dsee_scale.checkpoint.masks import masks_now
from dsee_scale.export.export import export_model, merged_weights
from dsee_scale.partition import open_partition
from dsee_scale.partition.eight_bit_moments import is_eight_bit, read_moment, write_moment
from tests.models import build, llama_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TARGETS = ("q_proj", "v_proj", "down_proj")


def adapted(device: str = "cuda") -> nn.Module:
    model = build(llama_config()).to(device)
    dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=4, num_sparse=8, target_modules=TARGETS))
    return model


def test_masters_follow_a_model_that_is_moved_after_they_were_made():
    torch.manual_seed(0)
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    expected = {name: value.detach().float().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    dsee_scale.keep_masters(optimizer)
    model.to("cuda")
    for _ in range(3):
        model(torch.ones(2, 8, dtype=torch.bfloat16, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masters = dict(zip(expected, optimizer.masters.values(), strict=True))
    for name, start in expected.items():
        torch.testing.assert_close(masters[name].cpu(), start - 3 * 2 * 1e-3)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_moments_of_eight_bits_are_read_and_written_wherever_they_are(name):
    optimizers = pytest.importorskip("bitsandbytes").optim
    param = nn.Parameter(torch.randn(400, 400, device="cuda"))
    optimizer = getattr(optimizers, name)([param], lr=1e-3)
    (param**2).sum().backward()
    optimizer.step()
    state = optimizer.state[param]
    assert is_eight_bit(state, "state1")
    before = read_moment(state, "state1", 0, param.numel()).clone()
    write_moment(state, "state1", 300, torch.zeros(500, device="cuda"))
    after = read_moment(state, "state1", 0, param.numel())
    assert not after[300:800].any() and torch.equal(after[1024:], before[1024:])


def test_merged_weights_are_on_the_models_device_and_are_those_of_the_export(tmp_path):
    model = adapted()
    dsee_scale.prune(model, dsee_scale.PruneConfig(sparsity=0.5, score="WABS"))
    export_model(model, tmp_path)
    stock = type(model).from_pretrained(tmp_path).state_dict()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # as vLLM's sender does
        found = {name: weight.clone() for name, weight in merged_weights(model)}
    stream.synchronize()
    assert {weight.device.type for weight in found.values()} == {"cuda"}
    for name, weight in found.items():
        assert torch.equal(weight.cpu(), stock[name]), name


def test_masks_are_known_again_where_weights_are_on_two_devices():
    model = adapted()
    dsee_scale.prune(model, dsee_scale.PruneConfig(sparsity=0.5, score="W"))
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data = layer.weight.data.cpu()
    masks = masks_now(open_partition(model), model, {})
    assert masks is not None and all(isinstance(number, int) for number in masks.sample)
