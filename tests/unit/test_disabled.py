"""With adapters disabled a model is its frozen base."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig, adapters_disabled
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import ConfigError, TargetError
from tests.models import build, gpt2_config, llama_config, token_batch
from tests.unit.test_export import tuned

SETTINGS = {"llama": llama_config, "gpt2": gpt2_config}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_before_pruning_it_is_the_base_model_bit_for_bit(name, dtype):
    config = SETTINGS[name]()
    model, ids = tuned(config, name, dtype=dtype, sparsity=0), token_batch()
    with torch.no_grad():
        base, tuned_logits = build(config, dtype).eval()(ids).logits, model(ids).logits
        with adapters_disabled(model):
            with adapters_disabled(model):
                assert torch.equal(model(ids).logits, base)
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, tuned_logits) and not torch.equal(base, tuned_logits)
        with pytest.raises(KeyError), adapters_disabled(model):
            raise KeyError
        assert torch.equal(model(ids).logits, tuned_logits)


def test_after_pruning_it_is_the_pruned_base():
    config, ids = llama_config(), token_batch()
    model = tuned(config)
    base = build(config).eval()
    with torch.no_grad():
        for name, param in base.named_parameters():
            param.copy_(model.get_parameter(name))
        with adapters_disabled(model):
            torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)


def test_gradients_flow_through_the_frozen_layers_and_none_reach_the_adapters():
    model = tuned(llama_config(), sparsity=0).train()
    embeddings = model.get_input_embeddings()(token_batch()).detach().requires_grad_()
    with adapters_disabled(model):
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert all(layer.dsee_flat.grad is None for layer in adapted_layers(model).values())


def test_what_has_no_frozen_base_is_refused():
    model = build(llama_config(tie_word_embeddings=False))
    with pytest.raises(TargetError, match="no adapters"), adapters_disabled(model):
        pass
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, trained_modules=("lm_head",)))
    dsee_scale.prune(model, PruneConfig(score="W"))
    with pytest.raises(ConfigError, match="lm_head"), adapters_disabled(model):
        pass
