"""What the loss says about where weights may go: gradients against autograd's own, shares that add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import FalconConfig, OPTConfig

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.algorithms.score import keys
from dsee_scale.config import Pool
from dsee_scale.errors import CalibrationError
from dsee_scale.partition import open_partition
from dsee_scale.passes.blocks import find_blocks
from dsee_scale.passes.pools import block_linears
from dsee_scale.passes.sensitivity import Sensitivity, has_loss, output_gradients
from dsee_scale.pruning import sensitivity_shares
from dsee_scale.pruning.common_threshold import NUM_BINS, SWAY, count_keys_, deal_removals
from dsee_scale.pruning.refit import pieces
from tests.models import build
from tests.unit.test_calibrate import batches, deberta, make


def labelled(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches with a different number of labels each."""
    found = []
    for index, batch in enumerate(batches(count)):
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        labels[:, : 2 + index] = -100
        found.append({**batch, "labels": labels})
    return found


def reference(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> Sensitivity:
    """By autograd with everything kept."""
    outputs: dict[str, torch.Tensor] = {}
    squares: dict[str, list[torch.Tensor]] = {}
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, layer in block_linears(model).items()
    ]
    model.enable_input_require_grads()  # without adapters in the first layer, nothing else begins a graph there
    for batch in data:
        loss = model.eval()(**batch).loss * (batch["labels"] != -100).sum()
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            counted = gradient[batch["attention_mask"].bool()]
            sums[name] = sums.get(name, 0) + counted.square().sum(0)
            squares.setdefault(name, []).append(counted.square().sum(1))
        tokens += int(batch["attention_mask"].sum())
    model.disable_input_require_grads()
    for handle in handles:
        handle.remove()
    relative = {name: [each / (sums[name].sum() / tokens) for each in squares[name]] for name in sums}
    return Sensitivity({name: value / tokens for name, value in sums.items()}, relative)


def found(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> Sensitivity:
    layers = block_linears(model)
    partition = open_partition(model)
    widths = {
        name: layer.weight.shape[1 if "conv" in type(layer).__name__.lower() else 0]
        for name, layer in layers.items()
    }
    return output_gradients(model, layers, widths, find_blocks(model, list(layers)), data, partition)


@pytest.mark.parametrize("family", ["llama", "gpt2", "everything"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_autograds_and_leave_no_trace(family, checkpointing):
    model, data = make(family), labelled()
    expected = reference(model, data)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    wanted = [param.requires_grad for param in model.parameters()]
    values = found(model, data)
    assert values.outputs.keys() == values.tokens.keys() == expected.outputs.keys()
    for name, value in values.outputs.items():
        torch.testing.assert_close(value, expected.outputs[name].float(), rtol=1e-4, atol=1e-10)
        for batch, other in zip(values.tokens[name], expected.tokens[name], strict=True):
            torch.testing.assert_close(batch, other.float(), rtol=1e-4, atol=1e-6)
    assert [param.requires_grad for param in model.parameters()] == wanted and any(wanted)
    assert all(param.grad is None for param in model.parameters())
    assert all(each.training for each in model.modules())


def settings(model: torch.nn.Module) -> list:
    """Of its config, and each module's rate and mode."""
    modules = [(getattr(each, "dropout", None), each.training) for each in model.modules()]
    return [model.config.to_dict(), *modules]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_call_dropout_themselves_run_without_it(checkpointing):
    """OPT's hold the rate, Falcon's config does."""
    sizes = dict(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    configs = [
        OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.5),
        FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5),
    ]
    for config in configs:
        model = build(config).requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = settings(model)
        values = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(found(model, labelled()))
        for name, value in values[0].outputs.items():
            assert torch.equal(value, values[1].outputs[name]), (type(model).__name__, name)
        assert settings(model) == before


HALF_GROUPS = PruneConfig(pattern="2:4", modules=("*attn*",))


@pytest.mark.parametrize("config", [PruneConfig(), HALF_GROUPS, PruneConfig(scope="matrix")])
def test_tokens_count_in_a_re_fit_as_the_loss_depends_on_them(config, monkeypatch):
    """Its first block's Gram matrices are X^T diag(root) X, one root for all that read X; by scope matrix none."""
    model, data = make("llama"), labelled()
    tokens = reference(model, data).tokens
    sharing = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    inputs: dict[str, list[torch.Tensor]] = {}
    block = model.model.layers[0]
    for name in (names[0] for names in sharing):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    expected = {}
    for names in sharing:
        total = 0
        for index, batch in enumerate(data):
            x = inputs[names[0]][index][batch["attention_mask"].bool()]
            weights = torch.stack([tokens[f"model.layers.0.{name}"][index] for name in names]).mean(0)
            weights = (
                torch.ones_like(weights) if config.scope == "matrix" else weights.sqrt().clamp(1 / 30, 30)
            )
            total = total + (x.T * weights) @ x
        gram = total / sum(int(batch["attention_mask"].sum()) for batch in data)
        expected |= {f"model.layers.0.{name}": gram for name in names}
    grams = {}
    real = pieces.solve
    monkeypatch.setattr(
        pieces, "solve", lambda *a: grams.setdefault(a[0].member.name, a[3]) is None or real(*a)
    )
    dsee_scale.prune(model, config, data)
    wanted = {name: gram for name, gram in expected.items() if config is not HALF_GROUPS or "attn" in name}
    for name, gram in wanted.items():
        torch.testing.assert_close(grams[name], gram, rtol=1e-4, atol=1e-5)


def test_weights_of_tokens_are_tempered_until_half_of_the_tokens_count():
    partition = open_partition(make("llama"))
    even, few = torch.linspace(0.5, 1.5, 64), torch.full((64,), 1 / 30)
    few[::16] = 30.0
    weights = {"even": [even[:40], even[40:]], "few": [few]}
    found = sensitivity_shares._tempered(weights, ["even", "few", "missing"], partition)
    assert all(map(torch.equal, found["even"], weights["even"]))

    def effective(power: float) -> float:
        return float((few**power).sum() ** 2 / (few**power).square().sum() / 64)

    expected = next(power for power in sensitivity_shares.TEMPERS if effective(power) >= 0.5)
    assert expected < 1
    torch.testing.assert_close(found["few"], [few**expected])


def test_a_decoder_needs_no_labels_and_others_do():
    model, data = make("llama"), batches(2)
    partition = open_partition(model)
    assert has_loss(model, data, partition)
    assert has_loss(model, [batch["input_ids"] for batch in data], partition)
    own = [{**b, "labels": b["input_ids"].masked_fill(~b["attention_mask"].bool(), -100)} for b in data]
    for name, value in found(model, data).outputs.items():
        assert torch.equal(value, found(model, own).outputs[name])
    assert not has_loss(model.model, data, partition)
    assert not has_loss(model, [(data[0]["input_ids"],)], partition)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), r"have the shape \(2, 5\); expected \(2, 12\) or \(2,\)"),
        (torch.full((2, 12), 10**6), r"go from 1000000 to 1000000; expected 0 to \d+ \(vocab_size\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_runs(labels, words):
    model = make("llama")
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(CalibrationError, match=words):
        dsee_scale.prune(model, PruneConfig(), [{**batches(1)[0], "labels": labels}])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_without_a_loss_every_matrix_loses_the_same_share_and_a_warning_says_so(caplog):
    one, two, data = make("llama"), make("llama"), batches(3)
    embed = one.get_input_embeddings()
    embedded = [
        {
            "inputs_embeds": embed(batch["input_ids"]).detach(),
            "attention_mask": batch["attention_mask"],
        }
        for batch in data
    ]
    dsee_scale.prune(one, PruneConfig(), embedded)
    assert "no labels that count" in caplog.text
    dsee_scale.prune(two, PruneConfig(scope="matrix"), embedded)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("labels", [-100, "the first alone", "one token"])
def test_labels_that_count_nowhere_are_no_loss(labels, caplog):
    one, two, data = make("llama"), make("llama"), batches(3)
    for batch in data:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        if labels == "the first alone":  # nothing predicts it
            batch["labels"][:, 0] = 3
    if labels == "one token":
        data = [{"input_ids": batch["input_ids"][:1, :1]} for batch in data]
    dsee_scale.prune(one, PruneConfig(), data)
    assert "no labels that count" in caplog.text
    dsee_scale.prune(two, PruneConfig(scope="matrix"), data)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_each_pool_loses_exactly_its_share_and_matrices_differ():
    model = make("everything")
    pools = (
        Pool(name="attention", sparsity=0.3, modules=("*attn*",)),
        Pool(name="mlp", sparsity=0.6, modules=("*mlp*",)),
    )
    report = dsee_scale.prune(model, PruneConfig(pools=pools), labelled())
    for part, sparsity in (("attn", 0.3), ("mlp", 0.6)):
        counts = [counts for name, counts in report.matrices.items() if part in name]
        assert sum(zeros for zeros, _ in counts) == round(sparsity * sum(total for _, total in counts))
        assert len({round(zeros / total, 3) for zeros, total in counts}) > 1
        lowest = (1 - SWAY) * sparsity
        for zeros, total in counts:
            assert lowest - 0.01 < zeros / total < 1 - (1 - SWAY) * (1 - sparsity) + 0.01


def test_a_matrix_that_the_loss_tells_nothing_of_loses_its_pools_share():
    """DeBERTa's projections of positions read nothing that begins at the first block's input."""
    model = deberta(1)
    data = [{**batch, "labels": torch.tensor([0, 1])} for batch in batches()]
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5), data)
    shares = {name: zeros / total for name, (zeros, total) in report.matrices.items()}
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    positions = {name for name in shares if ".pos_" in name}
    assert len(positions) == 4 and all(shares[name] == pytest.approx(0.5) for name in positions)
    assert max(shares.values()) > 0.55 and min(shares.values()) < 0.45


def histograms(scores: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.zeros(len(scores), NUM_BINS, dtype=torch.int64)
    for row, each in zip(rows, scores, strict=True):
        count_keys_(row, keys(each, torch.ones_like(each)))
    return rows


def test_shares_follow_one_threshold_and_add_up():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(400, generator=generator) * scale + 0.1 for scale in (1.0, 1.3, 1.7)]
    for num_remove in (0, 1, 333, 600, 1199):
        dealt = deal_removals(histograms(scores), num_remove)
        assert sum(dealt) == num_remove and all(0 <= count <= 400 for count in dealt)
    threshold = torch.cat(scores).sort().values[600]
    dealt = deal_removals(histograms(scores), 600)
    assert dealt == pytest.approx([int((each < threshold).sum()) for each in scores], abs=15)
    assert dealt[0] > dealt[1] > dealt[2]


def test_no_matrix_loses_nearly_all_or_nothing_and_zeros_always_go():
    scores = [torch.full((1000,), 1e-6), torch.full((1000,), 1.0), torch.full((1000,), 1e6)]
    low, middle, high = deal_removals(histograms(scores), 1500)
    assert low == round(1000 * (1 - (1 - SWAY) * 0.5)) and high == round(1000 * (1 - SWAY) * 0.5)
    assert low + middle + high == 1500
    gone = histograms(scores)
    gone[2, 0], gone[2, np.flatnonzero(gone[2].numpy())[-1]] = 900, 100
    assert deal_removals(gone, 1500)[2] >= 900


def test_zeros_count_into_what_goes_even_where_no_room_is_left_for_a_least_share():
    held = torch.zeros(2, NUM_BINS, dtype=torch.int64)
    held[0, 0], held[0, 2000] = 900, 100
    held[1, 0], held[1, 2000:2009] = 100, 100
    assert deal_removals(held, 1100) == [900, 200]
    assert deal_removals(held, 1001) == [900, 101]
    for fewer in (0, 600, 1000):
        assert deal_removals(held, fewer) == [900, 100]


def test_what_no_input_reaches_goes_first_and_only_as_far_as_asked():
    """Entries of inputs that are always zero score 0 and are not zero."""
    scores, weights = torch.ones(2, 1000), torch.ones(2, 1000)
    scores[0, :600], weights[1, :100] = 0.0, 0.0
    held = torch.zeros(2, NUM_BINS, dtype=torch.int64)
    for row, score, weight in zip(held, scores, weights, strict=True):
        count_keys_(row, keys(score, weight))
    assert held[:, 0].tolist() == [0, 100]
    assert deal_removals(held, 400) == [300, 100]
    assert deal_removals(held, 1000) == [692, 308]


def test_a_model_that_returns_no_more_than_a_tuple_is_refused_and_untouched():
    model = make("llama")
    forward, before = model.forward, {name: param.clone() for name, param in model.named_parameters()}
    model.forward = lambda input_ids, attention_mask=None, labels=None: (  # type: ignore[assignment]
        forward(input_ids=input_ids, attention_mask=attention_mask)[0],
    )
    with pytest.raises(CalibrationError, match="returns no logits for its labels"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5), labelled())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
