"""Does a runtime that decompresses sparse weights go faster on our zeros? OpenVINO on an x86 CPU with AMX.

    pip install openvino nncf
    python benchmarks/openvino_sparse.py [--json] [--quick] [--model FOLDER]

Its sparse weight decompression takes INT8 matrix products alone, so every model is quantised by NNCF first (weights and
activations). The same prompts go through the dense model and through those with half and 70% of the weights of every
matrix zero, once with the feature and once without. Ours is the time with it; peer is the dense model's. Wall-clock and
processor time: the latter tells it on a machine that others use too.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.recipe.parsing import cache_folder

sys.path.insert(0, str(Path(__file__).parent))
from _report import Report, parser

SPARSITIES = (0.5, 0.7)
LENGTHS = {"one token": 1, "prefill of 128": 128}
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
SMALL = dict(
    vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8
)


class Logits(nn.Module):
    """What is converted: tokens in, the last position's logits out, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # Mask and positions by hand: OpenVINO (2026.4) has no rule for how transformers (5.23) makes them.
        length = input_ids.shape[1]
        mask = torch.full((length, length), -1e4).triu(1)[None, None]
        positions = torch.arange(length)[None]
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=cache_folder() / "smollm2-135m-instruct")
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    chosen = arguments.parse_args()
    try:
        import nncf
        import openvino
    except ImportError as error:
        print(f"openvino_sparse: left out, {error} (pip install openvino nncf)", file=sys.stderr)
        return
    report = Report("openvino_sparse", chosen.json)
    versions = {"openvino": openvino.__version__, "nncf": nncf.__version__, "threads": chosen.threads}
    core = openvino.Core()
    quantised = {s: int8_model(load(chosen), s) for s in (0.0, *SPARSITIES)}
    runs = {(0.0, False): compiled(core, quantised[0.0], chosen.threads)}
    for sparsity in SPARSITIES:
        runs[sparsity, False] = compiled(core, quantised[sparsity], chosen.threads)
        runs[sparsity, True] = compiled(core, quantised[sparsity], chosen.threads, sparse=True)
    for words, length in LENGTHS.items():
        wall, processor = times(runs, prompt(length), chosen.repeats)
        for (sparsity, sparse), seconds in wall.items():
            if sparsity:
                kernels = sparse_kernels(runs[sparsity, sparse])
                case = f"{sparsity:.0%} zeros, {words}, {'decompressed' if sparse else 'as any weights'}"
                report.add(case, "time", "s", seconds, wall[0.0, False], sparse_kernels=kernels, **versions)
                used = processor[sparsity, sparse], processor[0.0, False]
                report.add(case, "processor time", "s", *used, **versions)


def load(chosen: Any) -> nn.Module:
    torch.manual_seed(0)
    if chosen.quick or not chosen.model.is_dir():
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="eager").eval()
    options = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(chosen.model, **options).eval()


def int8_model(model: nn.Module, sparsity: float) -> Any:
    import nncf
    import openvino

    if sparsity:
        dsee_scale.prune(model, PruneConfig(sparsity=sparsity, scope="matrix", score="W"))
    converted = openvino.convert_model(
        Logits(model), example_input=prompt(16), input=[("input_ids", [1, -1], openvino.Type.i64)]
    )
    calibration = nncf.Dataset([prompt(32, seed).numpy() for seed in range(4)])
    kind = nncf.ModelType.TRANSFORMER
    return nncf.quantize(converted, calibration, model_type=kind, subset_size=4, fast_bias_correction=True)


def compiled(core: Any, model: Any, threads: int, sparse: bool = False) -> Any:
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", settings | ({RATE: 0.3} if sparse else {}))


def sparse_kernels(model: Any) -> int:
    """How many matrix products really read compressed weights."""
    infos = [operation.get_rt_info() for operation in model.get_runtime_model().get_ops()]
    return sum("sparse" in info["primitiveType"].astype(str) for info in infos if "primitiveType" in info)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 500, (1, length), generator=torch.Generator().manual_seed(seed))


def times(runs: dict, ids: torch.Tensor, repeats: int) -> tuple[dict, dict]:
    """Median wall-clock and processor seconds of each model, called in turn."""
    found: dict = {key: [] for key in runs}
    for _ in range(repeats + 2):
        for key, model in runs.items():
            start = time.perf_counter(), time.process_time()
            model([ids.numpy()])
            found[key].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    medians = {
        key: [statistics.median(each[clock] for each in rows[2:]) for clock in (0, 1)]
        for key, rows in found.items()
    }
    return {k: wall for k, (wall, _) in medians.items()}, {k: used for k, (_, used) in medians.items()}


if __name__ == "__main__":
    main()
