"""Low-rank plus sparse, W ~ L + S, and the support of S: where a weight has its N sparse entries.

Shapes: O output features, I input features, R rank, N entries, b rows of a block. L = U V.

Nothing here makes a second O x I tensor: the weight is read in row blocks, each turned into the working
dtype (float32, or float64 for a float64 weight) on the device where the weight lives. Extra memory is a
few blocks (`CPU_BLOCK` or `DEVICE_BLOCK` entries each) and the factors U, V. The `reference` preset alone
holds one extra copy of the matrix.

Source: GreBsmo (Zhou and Tao, AISTATS 2013) as DSEE (arXiv 2111.00160, section 3.2) uses it. The `fast`
preset keeps its bilateral update and its growing rank, and differs in two points: the final rank is
small, and S comes from a soft threshold relative to the residual's own scale. docs/decomposition.md has
the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.reference import reference_low_rank
from dsee_scale.config import DecompositionConfig, SupportMethod
from dsee_scale.errors import ConfigError

CPU_BLOCK = 2**19
"""Entries of a row block on CPU: in float32 it fits a core's second-level cache."""
DEVICE_BLOCK = 2**24
"""Entries of a row block elsewhere: few kernel launches, 64 MiB in float32."""
OVERSAMPLING = 2
"""The iterations run at this many times the rank: the leading directions converge sooner."""
DOUBLINGS = 3
"""Rounds in which the width doubles before the full one is reached."""
SCALE_ROWS = 256
"""Rows that the residual's scale is measured on."""
FIRST_PIECE = 2**12
"""Entries that the search for the largest starts with."""


@dataclass(frozen=True)
class Support:
    """Positions of a matrix's sparse entries, sorted by (row, column), each once.

    Attributes:
        rows: (N,) int32, output indices.
        cols: (N,) int32, input indices.
    """

    rows: Tensor
    cols: Tensor


def validate(shape: Sequence[int], num_sparse: int) -> None:
    """Raise ConfigError if no support of `num_sparse` entries exists in a matrix of this shape."""
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(f"a support needs a matrix with at least one entry, found shape {tuple(shape)}")
    if num_sparse < 1:
        raise ConfigError(f"num_sparse must be at least 1, found {num_sparse}")
    rows, cols = shape
    if num_sparse > rows * cols:
        raise ConfigError(
            f"num_sparse is {num_sparse}, but a {rows} x {cols} matrix has only {rows * cols} entries; "
            f"lower num_sparse, or give it as a fraction of the entries"
        )


@torch.no_grad()
def find_support(
    weight: Tensor,
    num_sparse: int,
    method: SupportMethod,
    config: DecompositionConfig,
    generator: torch.Generator,
    among: Tensor | None = None,
) -> Support:
    """Where the sparse entries of a weight go.

    Args:
        weight: (O, I), any floating dtype, finite; it is not changed.
        num_sparse: N, from 1 to O * I.
        method: `grebsmo`: the N largest |W - L|; `magnitude`: the N largest |W|; `random`: uniform.
        config: the decomposition behind `grebsmo`.
        generator: the only source of randomness; it may live on another device than the weight.
        among: (O, I) bool, the entries to choose from; None for all.

    Returns:
        The support, on the weight's device. Of equal entries the one that comes first in row-major order
        is taken. The same generator state gives the same support.

    Raises:
        ConfigError: `num_sparse` does not fit the shape, or the weight is no matrix.
    """
    validate(weight.shape, num_sparse)
    if among is not None and (allowed := int(among.sum())) < num_sparse:
        raise ConfigError(
            f"num_sparse is {num_sparse}, but only {allowed} entries stay in the matrix; lower it"
        )
    if method == "random":
        numel = weight.numel() if among is None else int(among.sum())
        positions = _random_positions(numel, num_sparse, generator).to(weight.device)
        positions = positions if among is None else among.flatten().nonzero().squeeze(1)[positions]
    elif method == "magnitude":
        positions = _largest(_within(_magnitudes(weight), among), num_sparse, weight.device)
    else:
        left, right = low_rank(weight, config, generator)
        positions = _largest(_within(_residuals(weight, left, right), among), num_sparse, weight.device)
    rows = torch.div(positions, weight.shape[1], rounding_mode="floor")
    return Support(rows.to(torch.int32), (positions - rows * weight.shape[1]).to(torch.int32))


@torch.no_grad()
def low_rank(
    weight: Tensor, config: DecompositionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The low-rank part L = U V of a weight (O, I): U (O, R) with orthonormal columns and V (R, I).

    For `fast`, R is `config.rank`, but at most a quarter of the smaller side, so that a residual is left
    in small matrices too; with a side below 4 it is 0 and L is zero. For `reference`, R is 496 or the
    smaller side.
    """
    if config.preset == "reference":
        return reference_low_rank(weight.to(_working_dtype(weight)), generator)
    rank = min(config.rank, min(weight.shape) // 4)
    if rank == 0:
        return _empty_factors(weight)
    full = OVERSAMPLING * rank
    widths = [max(1, full >> halvings) for halvings in range(DOUBLINGS, 0, -1)] + [full] * config.iterations
    return _truncated(*_clipped_bilateral(weight, widths, config.clip, generator), rank)


def _clipped_bilateral(
    weight: Tensor, widths: Sequence[int], clip: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """U = orth(X V^T), V = U^T X, where X = W - S = L + (W - L clipped to `clip` times its mean size).

    One round, which is one power iteration, per width. Clipping keeps an outlier that is as large as a
    singular value of W from becoming a direction of L, and unlike a hard threshold it recovers from a
    wrong first guess. Growing from few directions lets those of L come first: the residual is small, and
    the clip close, before there is room for outliers.
    """
    dtype = _working_dtype(weight)
    left, right = _empty_factors(weight)
    direction = _normal(widths[0], weight.shape[1], weight, generator)
    for width, following in zip(widths, [*widths[1:], widths[-1]], strict=True):
        limit = clip * float(_residual_scale(weight, left, right, generator))
        image = [block @ direction.T for _, block in _clipped_blocks(weight, left, right, limit)]
        basis = torch.linalg.qr(torch.cat(image))[0]
        # Random rows of X - U V join V, as many as the next round is wider: one pass gives both.
        probe = _normal(following - width, weight.shape[0], weight, generator).T / weight.shape[0] ** 0.5
        both = torch.cat([basis, probe], dim=1)
        projected = weight.new_zeros(following, weight.shape[1], dtype=dtype)
        for rows, block in _clipped_blocks(weight, left, right, limit):
            projected.addmm_(both[rows].T, block)
        left, right = basis, projected[:width]
        direction = torch.cat([right, projected[width:] - (probe.T @ left) @ right])
        # Weights of size 1e-30 or 1e+30 must neither vanish nor overflow in the next product.
        direction /= direction.abs().amax().clamp_min(torch.finfo(dtype).tiny)
    return left, right


def _empty_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=_working_dtype(weight), device=weight.device)
    return like.new_empty(weight.shape[0], 0), like.new_empty(0, weight.shape[1])


def _normal(rows: int, cols: int, weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, cols, generator=generator, device=generator.device)
    return drawn.to(weight.device, _working_dtype(weight))


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading directions of L = U V, where U has orthonormal columns."""
    triangle = torch.linalg.qr(right.T, mode="r")[1]
    leading = torch.linalg.svd(triangle.T)[0][:, :rank]
    return left @ leading, leading.T @ right


def _low_blocks(weight: Tensor, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of the weight and L there, in one buffer: a block is gone when the next one comes."""
    buffer = None
    for start, stop in _row_blocks(weight):
        if buffer is None:
            buffer = left.new_empty(stop, right.shape[1])
        yield slice(start, stop), torch.mm(left[start:stop], right, out=buffer[: stop - start])


def _clipped_blocks(
    weight: Tensor, left: Tensor, right: Tensor, limit: float
) -> Iterator[tuple[slice, Tensor]]:
    spare = None
    for rows, low in _low_blocks(weight, left, right):
        if spare is None:
            spare = torch.empty_like(low)
        residual = torch.sub(weight[rows].to(low.dtype), low, out=spare[: len(low)])
        yield rows, low.add_(residual.clamp_(-limit, limit))


def _residual_scale(weight: Tensor, left: Tensor, right: Tensor, generator: torch.Generator) -> Tensor:
    """Mean |W - L|, a scalar tensor, over rows drawn at random (all rows of a small matrix)."""
    rows = torch.arange(weight.shape[0])
    if weight.shape[0] > SCALE_ROWS:
        rows = torch.randint(weight.shape[0], (SCALE_ROWS,), generator=generator, device=generator.device)
    rows = rows.to(weight.device)
    return torch.addmm(weight[rows].to(left.dtype), left[rows], right, alpha=-1).abs_().mean()


def _residuals(weight: Tensor, left: Tensor, right: Tensor) -> Iterator[Tensor]:
    for rows, low in _low_blocks(weight, left, right):
        yield low.sub_(weight[rows].to(low.dtype)).abs_()


def _magnitudes(weight: Tensor) -> Iterator[Tensor]:
    for start, stop in _row_blocks(weight):
        yield weight[start:stop].to(_working_dtype(weight)).abs()


def _within(blocks: Iterable[Tensor], among: Tensor | None) -> Iterator[Tensor]:
    """The blocks of rows with a size that is never chosen wherever `among` is False."""
    row = 0
    for block in blocks:
        yield block if among is None else block.masked_fill(~among[row : row + len(block)], -1.0)
        row += len(block)


def _largest(blocks: Iterable[Tensor], count: int, device: torch.device) -> Tensor:
    """Flat positions (count,), ascending, of the `count` largest entries of the stacked (b, I) blocks.

    Exact; of equal entries the earlier ones are taken. Only entries above the count-th largest so far
    are kept, so memory stays near `count` entries plus one block.
    """
    values = torch.empty(0, device=device)
    positions = torch.empty(0, dtype=torch.int64, device=device)
    floor, offset = -1.0, 0
    for piece in _growing_pieces(blocks, count):
        if len(values) < count or float(piece.amax()) > floor:
            found = (piece > floor).nonzero().squeeze(1)
            values = torch.cat([values.to(piece.dtype), piece[found]])
            positions = torch.cat([positions, found + offset])
        if len(values) > 2 * count:
            values, positions = _trim(values, positions, count)
            floor = float(values.amin())
        offset += piece.numel()
    return _trim(values, positions, count)[1]


def _growing_pieces(blocks: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The blocks' entries in row-major order, in pieces that start small: a first floor is soon found."""
    seen = 0
    for block in blocks:
        flat = block.flatten()
        start = 0
        while start < flat.numel():
            piece = flat[start : start + max(seen, 4 * count, FIRST_PIECE)]
            yield piece
            start += piece.numel()
            seen += piece.numel()


def _trim(values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (M,) values with ascending positions, in the same order."""
    smallest = values.topk(count, sorted=False).values.amin()
    keep = values > smallest
    ties = (values == smallest).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return values[keep], positions[keep]


def _random_positions(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct flat positions, uniform over all such sets, ascending; no permutation of `numel`."""
    device = generator.device
    if 2 * count > numel:
        keep = torch.ones(numel, dtype=torch.bool, device=device)
        if count < numel:
            keep[_random_positions(numel, numel - count, generator)] = False
        return keep.nonzero().squeeze(1)
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < count:
        drawn = torch.randint(numel, (2 * (count - len(found)),), generator=generator, device=device)
        found = torch.unique(torch.cat([found, drawn]))
    chosen = torch.randperm(len(found), generator=generator, device=device)[:count]
    return found[chosen].sort().values


def _row_blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) row ranges; they depend on the shape and the kind of device alone."""
    entries = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, entries // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield start, min(start + rows, weight.shape[0])


def _working_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
