"""How much of a support stays when the base is quantised before it is decomposed.

    python benchmarks/quantised_support.py MODEL_FOLDER [--json] [--quick]

For each linear layer of the blocks: the share of the N entries chosen from the bfloat16 weight that is also chosen
from the same weight quantised by bitsandbytes and decoded again. `peer` is the share for a random choice.
"""

from __future__ import annotations

import statistics

import torch
from _report import Report, parser
from safetensors.torch import load_file

from dsee_scale import DecompositionConfig
from dsee_scale.algorithms.decompose import Support, find_support
from dsee_scale.partition.quantized import as_stored

FORMATS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}


def block_weights(folder: str, count: int | None) -> list[torch.Tensor]:
    """The square and tall matrices of the blocks, without embeddings."""
    tensors = load_file(f"{folder}/model.safetensors")
    found = [
        t for name, t in sorted(tensors.items()) if "layer" in name and t.dim() == 2 and min(t.shape) >= 64
    ]
    return [tensor.to(torch.bfloat16) for tensor in found[:count]]


def support(weight: torch.Tensor, num_sparse: int, method: str) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    chosen: Support = find_support(weight, num_sparse, method, DecompositionConfig(), generator)  # type: ignore[arg-type]
    return set((chosen.rows.long() * weight.shape[1] + chosen.cols.long()).tolist())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", help="a model with model.safetensors")
    arguments.add_argument("--num-sparse", type=int, default=64)
    arguments = arguments.parse_args()
    torch.set_num_threads(1)
    weights = block_weights(arguments.folder, 6 if arguments.quick else None)
    report = Report("quantised_support", arguments.json)
    for method in ("grebsmo", "magnitude"):
        exact = [support(weight, arguments.num_sparse, method) for weight in weights]
        for name, how in FORMATS.items():
            shares = [
                len(one & support(as_stored(weight, how), arguments.num_sparse, method)) / len(one)
                for weight, one in zip(weights, exact, strict=True)
            ]
            chance = statistics.mean(arguments.num_sparse / weight.numel() for weight in weights)
            report.add(
                f"{method}, {name}", "share kept", "1", statistics.mean(shares), chance, least=min(shares)
            )


if __name__ == "__main__":
    main()
