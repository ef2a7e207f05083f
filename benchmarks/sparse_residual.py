"""The sparse residual alone, forward plus backward, against a dense masked layer and torch.sparse.

    python benchmarks/sparse_residual.py --json

One matrix (4096 x 4096; 1024 x 1024 with --quick), 64 and 512 tokens, N from 16 to 1% of the matrix. Every
side computes y = x S2^T and the gradients of x and of S2's entries:

- ours: what the adapted layer runs, on y and dx that exist already, as they do there;
- dense masked: a dense O x I parameter times a mask, built at every step, with its dense gradient, which is
  how the paper's released code trains S2;
- torch.sparse: a CSR matrix made of the same values at every step, through PyTorch's own autograd.

The extra memory is the highest sum of what is allocated during a step, over what is there before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from _report import Report, median_seconds_each, parser
from torch import Tensor

from dsee_scale.adapters.kernels.sparse_residual import backward_, forward_
from dsee_scale.adapters.support import prepare


class Case:
    """One problem and the three ways to compute it; each returns (y, dx, gradient of the entries)."""

    def __init__(
        self, shape: tuple[int, int], tokens: int, count: int, dtype: torch.dtype, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        flat = torch.randperm(shape[0] * shape[1], generator=generator)[:count].sort().values
        self.rows, self.cols = (flat // shape[1]).int().to(device), (flat % shape[1]).int().to(device)
        self.dy, self.x = (torch.randn(tokens, n, generator=generator).to(device, dtype) for n in shape)
        self.values = torch.randn(count, generator=generator).to(device, dtype)
        self.support = prepare(self.rows, self.cols, shape)
        self.at = (self.rows.long(), self.cols.long())
        self.shape = shape
        self.starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=device)
        self.starts[1:] = torch.bincount(self.rows, minlength=shape[0]).cumsum(0)
        self.y, self.dx = torch.zeros_like(self.dy), torch.zeros_like(self.x)

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        forward_(self.y, self.x, self.values, self.support)
        return self.y, self.dx, backward_(self.dx, self.dy, self.x, self.values, self.support)

    def make_dense(self) -> None:
        """The masked layer's parameter and mask, made for its own runs only."""
        self.mask = self.x.new_zeros(self.shape).index_put(self.at, self.x.new_ones(()))
        self.dense_values = self.x.new_zeros(self.shape).index_put(self.at, self.values)
        self.dense_values.requires_grad_()

    def dense_masked(self) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x.detach().requires_grad_()
        y = torch.nn.functional.linear(x, self.dense_values * self.mask)
        dx, dense = torch.autograd.grad(y, (x, self.dense_values), self.dy)
        return y, dx, dense

    def torch_sparse(self) -> tuple[Tensor, Tensor, Tensor]:
        x, values = self.x.detach().requires_grad_(), self.values.detach().requires_grad_()
        s2 = torch.sparse_csr_tensor(self.starts, self.cols, values, self.shape)
        y = (s2 @ x.t()).t()
        return y, *torch.autograd.grad(y, (x, values), self.dy)


def check(case: Case) -> None:
    """All sides compute the same thing."""
    case.y.zero_(), case.dx.zero_()
    ours, dense = case.ours(), case.dense_masked()
    for found, expected in zip(ours, (*dense[:2], dense[2][case.at]), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02 * scale)


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Highest sum of allocations during one call, over what was there before."""
    function()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronised(function: Callable[[], object], device: str) -> Callable[[], object]:
    if device == "cpu":
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = arguments.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Sparse")
    device, dtype, size = arguments.device, getattr(torch, arguments.dtype), 1024 if arguments.quick else 4096
    report = Report("sparse_residual", arguments.json)
    counts = [16, 64, 256, round(1e-4 * size**2), round(1e-3 * size**2), round(1e-2 * size**2)]
    for tokens in (64, 512):
        for count in counts:
            case = Case((size, size), tokens, count, dtype, device)
            case.make_dense()
            check(case)
            measure(case, f"{size} x {size}, {tokens} tokens, N = {count}", report, device)


def measure(case: Case, name: str, report: Report, device: str) -> None:
    """The three sides in turn; torch.sparse only where it knows the dtype."""
    sides = [synchronised(f, device) for f in (case.ours, case.dense_masked, case.torch_sparse)]
    details = {"method": case.support.method, "dtype": str(case.x.dtype).removeprefix("torch.")}
    try:
        case.torch_sparse()
    except RuntimeError:
        sides.pop()
    seconds = median_seconds_each(*sides, repeats=9, warmup=2)
    report.add(name, "time, vs dense masked", "s", seconds[0], seconds[1], **details)
    if len(sides) == 3:
        report.add(name, "time, vs torch.sparse", "s", seconds[0], seconds[2], **details)
    vector = case.values.numel() * 4
    tokens_bytes = 2 * case.x.numel() * case.x.element_size()
    memory = [peak_bytes(side, device) for side in sides[:2]]
    details |= {"of_entries": vector, "of_activations": tokens_bytes}
    report.add(name, "extra memory, vs dense masked", "B", *memory, **details)


if __name__ == "__main__":
    main()
