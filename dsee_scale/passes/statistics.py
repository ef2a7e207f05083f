"""How large the inputs of each layer, and of each expert, are: what scores that look at activations read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsee_scale.errors import FormatError

FORMAT_VERSION = 2
LEAST_TOKENS = 32
"""An expert that fewer tokens reached has no norms of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """How large each layer's inputs are, over all ranks' calibration tokens.

    Attributes:
        squares: module name -> (I,) float32, sum of the squares of each input.
        tokens: module name -> tokens that reached it.
        fingerprint: of the model and the adapter values that they were collected with.
        gated: module with experts -> for each expert the sum over its tokens of gate value times norm of its output.
    """

    squares: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    fingerprint: str
    gated: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def reached(self, name: str) -> bool:
        """Whether enough tokens reached a module, or an expert's matrix, for norms of its own."""
        of_expert = name.rsplit(".", 2)[0] in self.gated
        return self.tokens.get(name, 0) >= (LEAST_TOKENS if of_expert else 1)

    def norms(self, name: str) -> Tensor | None:
        """(I,) float32 root mean square of each input of a matrix, on the CPU; None if too few tokens reached it."""
        return (self.squares[name] / self.tokens[name]).sqrt_() if self.reached(name) else None

    def save(self, path: str | Path) -> None:
        """Write as one safetensors file. Call it on one rank."""
        path = Path(path)
        # Layers with one input share one tensor, here as in memory.
        first: dict[int, str] = {}
        stored = {name: first.setdefault(id(value), name) for name, value in self.squares.items()}
        header = {
            "format": "dsee_statistics",
            "version": str(FORMAT_VERSION),
            "tokens": json.dumps(self.tokens),
            "stored": json.dumps(stored),
            "fingerprint": self.fingerprint,
            "gated": json.dumps(dict(self.gated)),
        }
        partial = path.with_name(path.name + ".partial")
        save_file({name: self.squares[name].contiguous() for name in first.values()}, partial, header)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            FormatError: not such a file, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            squares = {name: tensors[at] for name, at in json.loads(header["stored"]).items()}
            tokens = {str(name): int(count) for name, count in json.loads(header["tokens"]).items()}
            version, found = header["version"], header["fingerprint"]
            gated = {name: [float(one) for one in sums] for name, sums in json.loads(header["gated"]).items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} holds no calibration statistics: {error}") from error
        if version != str(FORMAT_VERSION):
            raise FormatError(f"{path} has format version {version}; this dsee_scale reads {FORMAT_VERSION}")
        if squares.keys() != tokens.keys() or not all(
            value.dim() == 1
            and value.dtype == torch.float32
            and bool((value >= 0).all() & value.isfinite().all())
            for value in squares.values()
        ):
            raise FormatError(f"{path} is damaged: expected one non-negative float32 vector for each module")
        return cls(squares, tokens, found, gated)
