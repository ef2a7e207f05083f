"""One layer trained under the mask, y = x ((W + D) * M)^T, forward and backward, against the same layer frozen.

    python benchmarks/under_mask.py [--json] [--quick]

- extra memory: what the layer takes at its peak beyond the frozen one; the peer is the size of one weight;
- time; the frozen layer computes its output and its input's gradient.
"""

from __future__ import annotations

import torch
from _report import Report, parser
from sparse_residual import median_seconds_each, peak_bytes
from torch import Tensor, nn

from dsee_scale.adapters.linear import attach, train_under_mask
from dsee_scale.algorithms.delta import AdapterSpec

RANK, NUM_SPARSE = 16, 64


def pruned_layer(outputs: int, inputs: int) -> nn.Linear:
    """Half of its entries zero, adapted, under the mask."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.data[torch.rand(outputs, inputs) < 0.5] = 0
    spec = AdapterSpec(
        shape=(outputs, inputs),
        transposed=False,
        slices=((0, outputs),),
        rank=RANK,
        num_sparse=NUM_SPARSE,
        scaling=2.0,
    )
    at = torch.randperm(outputs * inputs)[:NUM_SPARSE].sort().values
    attach(layer, spec, at // inputs, at % inputs, dtype=torch.bfloat16, device="cpu")
    train_under_mask(layer, True)
    return layer


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report("under_mask", arguments.json)
    tokens = 128 if arguments.quick else arguments.tokens
    for outputs, inputs in [(256, 256)] if arguments.quick else [(2048, 2048), (5632, 2048)]:
        layer = pruned_layer(outputs, inputs)
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16).requires_grad_()
        dy = torch.randn(tokens, outputs, dtype=torch.bfloat16)

        def frozen(layer: nn.Linear = layer, x: Tensor = x, dy: Tensor = dy) -> object:
            return torch.autograd.grad(nn.functional.linear(x, layer.weight), x, dy)

        def masked(layer: nn.Linear = layer, x: Tensor = x, dy: Tensor = dy) -> object:
            return torch.autograd.grad(layer(x), [x, layer.dsee_flat], dy)

        case = f"{outputs} x {inputs}, {tokens} tokens"
        extra = peak_bytes(masked, "cpu") - peak_bytes(frozen, "cpu")
        report.add(case, "extra memory, against one weight", "B", extra, layer.weight.nbytes)
        times = median_seconds_each(masked, frozen, repeats=9, warmup=2)
        report.add(case, "time, against the frozen layer", "s", *times)


if __name__ == "__main__":
    main()
