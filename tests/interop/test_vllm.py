"""vLLM serves what we export as the libraries that it was made with do: `make test-interop`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.export.export import export_model, merged_weights
from dsee_scale.export.lora import export_lora
from dsee_scale.recipe.parsing import cache_folder
from tests.unit.test_lora_export import with_update

SMOLLM2 = cache_folder() / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not here: examples/demo/demo_inputs.py"),
    pytest.mark.timeout(600),
]
TUNED = DSEEConfig(rank=8, num_sparse=16, support="magnitude", target_modules=("q_proj", "down_proj"))
PROMPTS = ["The capital of France is", "Water boils at a temperature of one hundred", "def add(a, b): return"]
SERVE = """
import json, sys
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    folder, lora, rank, weights, prompts = json.loads(sys.argv[1])
    settings = dict(enable_lora=True, max_lora_rank=rank) if lora else {}
    llm = LLM(folder, dtype="float32", max_model_len=64, max_num_seqs=4, enforce_eager=True, **settings)
    if weights:  # as a trainer sends them while it serves
        llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=load_file(weights).items()))
    wanted = SamplingParams(max_tokens=6, logprobs=1, temperature=0, ignore_eos=True)
    rows = [{"prompt_token_ids": ids} for ids in prompts]
    request = LoRARequest("ours", 1, lora) if lora else None
    outputs = [each.outputs[0] for each in llm.generate(rows, wanted, lora_request=request)]
    said = [[at[token].logprob for token, at in zip(each.token_ids, each.logprobs)] for each in outputs]
    print("FOUND", json.dumps([[list(each.token_ids), row] for each, row in zip(outputs, said)]))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def served(
    folder: Path,
    prompts: list[list[int]],
    lora: Path | None = None,
    rank: int = 0,
    weights: Path | None = None,
) -> list[tuple[list[int], list[float]]]:
    """What vLLM, in a process of its own, says next, and the log-probability of each token."""
    words = json.dumps([str(folder), lora and str(lora), rank, weights and str(weights), prompts])
    told = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # One process: what reload_weights is given need not be pickled.
    environment = {**os.environ, **told, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = subprocess.run(
        [sys.executable, "-c", SERVE, words], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("FOUND"))[6:])


def largest_gap(
    model: nn.Module, prompts: list[list[int]], found: list[tuple[list[int], list[float]]]
) -> float:
    """Between the log-probabilities that were served and the model's own of the same tokens."""
    gaps = []
    for prompt, (tokens, said) in zip(prompts, found, strict=True):
        assert len(tokens) == 6
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps.append(float((own - torch.tensor(said)).abs().max()))
    return max(gaps)


def smollm2() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()


def test_a_lora_on_its_pruned_base_says_what_stock_peft_says(tmp_path, tokenizer, prompts):
    """Half of the weights gone, B A + S2 beside them, one rank for all modules."""
    from peft import PeftModel

    model = smollm2()
    dsee_scale.inject(model, TUNED)
    with_update(model)
    dsee_scale.prune(model, PruneConfig(score="W", mask_update=False))
    report = export_lora(model, tmp_path / "lora", uniform_rank=True, tokenizer=tokenizer)
    base = tmp_path / "lora" / "base"
    found = served(base, prompts, lora=tmp_path / "lora", rank=report.served_rank)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    without = largest_gap(stock, prompts, found)
    gap = largest_gap(PeftModel.from_pretrained(stock, tmp_path / "lora"), prompts, found)
    print(f"LoRA of rank {report.rank}: {gap:.1e}, without it {without:.1e}")
    assert gap < 1e-3 < 0.1 < without


def test_a_model_of_fewer_heads_and_neurons_is_served_as_it_is(tmp_path, tokenizer, prompts):
    model = smollm2()
    heads = PruneConfig(pattern="heads", num_per_layer=3, score="W")
    dsee_scale.prune(model, [heads, PruneConfig(pattern="neurons", num_per_layer=384, score="W")])
    report = export_model(model, tmp_path / "small", tokenizer=tokenizer)
    assert report.loads_with == "transformers"
    found = served(tmp_path / "small", prompts)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    gap, before = largest_gap(stock, prompts, found), largest_gap(smollm2(), prompts, found)
    print(f"fewer heads and neurons: {gap:.1e}, with all of them {before:.1e}")
    assert gap < 1e-3 < 0.1 < before


def test_the_merged_weights_of_a_model_in_training_replace_those_of_a_running_server(tmp_path, prompts):
    model = smollm2()
    dsee_scale.inject(model, TUNED)
    with_update(model)
    dsee_scale.prune(model, PruneConfig(score="W"))
    sent = {name: weight.clone() for name, weight in merged_weights(model)}
    save_file(sent, tmp_path / "sent.safetensors")
    found = served(SMOLLM2, prompts, weights=tmp_path / "sent.safetensors")
    gap, before = largest_gap(model, prompts, found), largest_gap(smollm2(), prompts, found)
    print(f"merged weights: {gap:.1e}, those it started with {before:.1e}")
    assert gap < 1e-3 < 0.1 < before


def test_a_model_of_fewer_experts_is_served_as_it_is(tmp_path, tokenizer, prompts):
    """Two of eight experts gone from every layer, their router's rows with them."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,  # far enough from chance that an expert matters
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    whole = copy.deepcopy(model)
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=2, score="random"))
    report = export_model(model, tmp_path / "small", tokenizer=tokenizer)
    assert report.loads_with == "transformers"
    found = served(tmp_path / "small", prompts)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    gap, before = largest_gap(stock, prompts, found), largest_gap(whole, prompts, found)
    print(f"fewer experts: {gap:.1e}, with all of them {before:.1e}")
    assert gap < 1e-3 < 0.1 < before
