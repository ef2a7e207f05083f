"""The end of an in-place edit: codes are written, and what other streams of a GPU do next waits for it."""

from __future__ import annotations

import pytest
import torch

from dsee_scale.partition import open_partition, ranks
from dsee_scale.partition.quantized import prepare_quantised
from tests.quantised import quantised_llama, write_llama

pytestmark = pytest.mark.unit


class Stream:
    """Stands in for a GPU's current stream, of which this machine has none."""

    waited: list[torch.device]

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        self.waited.append(self.device)


def test_an_edit_on_a_gpu_ends_when_its_stream_has_done_it(monkeypatch):
    Stream.waited = []
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    ranks.settle(torch.device("cpu"))
    assert not Stream.waited
    ranks.settle(torch.device("cuda", 1))
    assert Stream.waited == [torch.device("cuda", 1)]


def test_codes_are_written_before_the_edit_is_settled(monkeypatch, tmp_path):
    """Whatever stores the weight: every stretch, on its own device, after the body and the codes."""
    model = quantised_llama(write_llama(tmp_path), "nf4")
    prepare_quantised(model)
    param, settled = model.model.layers[0].self_attn.q_proj.weight, []

    def settle(device: torch.device) -> None:
        settled.append((device, int((partition.shard(param).data == 0).sum())))

    monkeypatch.setattr(ranks, "settle", settle)
    partition = open_partition(model)
    with partition.edit(param) as stretches:
        stretches[0].data.zero_()
        assert not settled
    assert settled == [(torch.device("cpu"), partition.shape(param).numel())]
