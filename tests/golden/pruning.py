"""What the paper's released pruning removes from a small BERT, and the golden masks made with it.

    python -m tests.golden.pruning        writes tests/golden/pruning_bert.safetensors (a second)

Written anew from what the repository's programs do, with plain dense tensors and PyTorch's own pruning: the
score takes the weight's place in query and value, then `prune.global_unstructured` ranks query and value in
one pool and key, the dense layers and the pooler in another; heads are ranked layer by layer by the sum of
their rows' scores in query and value. `released_wabs` is the repository's mode WABS, in which the scaling
reaches S2 alone; `wabs` scales both parts, as the forward pass does.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

GOLDEN = Path(__file__).with_name("pruning_bert.safetensors")
LAYERS, HIDDEN, HEADS, NEURONS = 2, 24, 6, 36
RANK, ALPHA, COUNT = 3, 6.0, 7
ADAPTED_SHARE, OTHER_SHARE, HEADS_REMOVED = 0.2, 0.3, 2
MODES = ("W", "AB", "ABS", "WAB", "WABS", "NAB", "NABS")


def block_shapes() -> dict[str, tuple[int, int]]:
    """Names and shapes of the pruned weights, in the model's order."""
    shapes = {}
    for layer in range(LAYERS):
        prefix = f"bert.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            shapes[f"{prefix}.attention.self.{name}"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.attention.output.dense"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.intermediate.dense"] = (NEURONS, HIDDEN)
        shapes[f"{prefix}.output.dense"] = (HIDDEN, NEURONS)
    return {**shapes, "bert.pooler.dense": (HIDDEN, HIDDEN)}


def is_adapted(name: str) -> bool:
    return name.endswith(("query", "value"))


def draw() -> dict[str, Tensor]:
    """Weights, and for query and value A, B, the positions and the values of S2; float32."""
    random = numpy.random.RandomState(0)
    tensors = {}
    for name, (rows, cols) in block_shapes().items():
        tensors[f"{name}.weight"] = torch.from_numpy(random.randn(rows, cols) * 0.1).float()
        if is_adapted(name):
            tensors[f"{name}.A"] = torch.from_numpy(random.randn(RANK, cols) * 0.1).float()
            tensors[f"{name}.B"] = torch.from_numpy(random.randn(rows, RANK) * 0.1).float()
            positions = numpy.sort(random.permutation(rows * cols)[:COUNT])
            tensors[f"{name}.positions"] = torch.from_numpy(positions)
            tensors[f"{name}.values"] = torch.from_numpy(random.randn(COUNT) * 0.3).float()
    return tensors


def stand_in(mode: str, name: str, drawn: dict[str, Tensor]) -> Tensor:
    """What takes the place of an adapted weight while it is ranked, (O, I) float64."""
    weight, a, b, values = (drawn[f"{name}.{key}"].double() for key in ("weight", "A", "B", "values"))
    s2 = torch.zeros(weight.numel(), dtype=torch.float64)
    s2[drawn[f"{name}.positions"]] = values
    s2, scaling, product = s2.view_as(weight), ALPHA / RANK, b @ a
    return {
        "W": weight,
        "AB": product * scaling,
        "ABS": (product + s2) * scaling,
        "WAB": weight + product * scaling,
        "WABS": weight + (product + s2) * scaling,
        "NAB": 1 / product,
        "NABS": 1 / (product + s2) / scaling,
        "released_wabs": weight + product + s2 * scaling,
    }[mode]


def pruned(values: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which entries one pool loses, bool by name."""
    modules = {name: nn.Linear(*reversed(value.shape), bias=False) for name, value in values.items()}
    for name, module in modules.items():
        module.weight.data = values[name].clone()
    ranked = torch.cat([value.abs().flatten() for value in values.values()]).sort().values
    cut = round(share * len(ranked))
    assert ranked[cut] - ranked[cut - 1] > 1e-6 * ranked[cut], "too close to call in float32: draw again"
    pool = [(module, "weight") for module in modules.values()]
    prune.global_unstructured(pool, pruning_method=prune.L1Unstructured, amount=share)
    return {name: module.weight_mask == 0 for name, module in modules.items()}


def heads(parts: list[Tensor]) -> Tensor:
    """The heads that a layer loses, ascending, from its scores (O, I) in query and in value."""
    per_head = sum(part.abs().sum(dim=1).view(HEADS, -1).sum(dim=1) for part in parts)
    return torch.as_tensor(per_head).argsort()[:HEADS_REMOVED].sort().values


def make() -> dict[str, Tensor]:
    """Everything that the file holds: masks packed to bits, heads as numbers."""
    drawn, found = draw(), {}
    adapted, others = [[n for n in block_shapes() if is_adapted(n) == side] for side in (True, False)]
    masks = {
        f"others.{n}": m for n, m in pruned({n: drawn[f"{n}.weight"] for n in others}, OTHER_SHARE).items()
    }
    for mode in (*MODES, "released_wabs"):
        values = {name: stand_in(mode, name, drawn) for name in adapted}
        masks |= {f"{mode}.{name}": mask for name, mask in pruned(values, ADAPTED_SHARE).items()}
        for layer in range(LAYERS):
            parts = [value for name, value in values.items() if f"layer.{layer}." in name]
            found[f"heads.{mode}.{layer}"] = heads(parts)
    packed = {n: torch.from_numpy(numpy.packbits(m.flatten().numpy())) for n, m in masks.items()}
    return {**found, **packed}


if __name__ == "__main__":
    save_file(make(), GOLDEN)
