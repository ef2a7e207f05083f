"""How important each entry of a weight is, and the integer keys that order entries like their scores.

With U = s * B A (modes AB, WAB, NAB) or U = D = s * (B A + S2) (modes ABS, WABS, NABS):

    wanda |w + u| * norm of the input    W |w|    AB, ABS |u|    WAB, WABS |w + u|    NAB, NABS 1 / |u|
    random: uniform in [0, 1)

A matrix without an adapter has u = 0: it is scored by |w| (times the norm), and by chance in mode random. One
without norms (no token reached it) is scored by |w| under wanda too. Scores are float32. wanda is Sun et al.
(arXiv 2306.11695), with the root mean square over tokens as the norm, which orders entries alike. The
paper's released code scales only S2 in WABS; here both terms are scaled, as in the forward pass.

*Keys.* The bits of a non-negative float order as integers, so a key is the score's bits, with two
exceptions. A weight that is already zero gets key 0 and goes first in every mode: that makes gradual
pruning cumulative, and pruning twice the same as once. Any other weight has a key of at least 1, so a
score of exactly 0 counts as the smallest positive float. The keys of |w| are then simply the weight's own
bits without the sign: no keys need to be made, and for bfloat16 and float16 they have 16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.bits import INTEGERS
from dsee_scale.algorithms.delta import Delta, FlatBlock, delta_block, flat_blocks, low_rank_block
from dsee_scale.config import SCORES, Score

HALF_DTYPES = (torch.bfloat16, torch.float16)
TOKENS_AT_ONCE, ENTRIES_AT_ONCE = 128, 2**17


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking:
    """How one weight's entries are ranked.

    Attributes:
        mode: the score.
        name: the parameter's name, part of the seed of mode random.
        delta: the weight's update; None if it has no adapter.
        norms: mode wanda: (I,) float32, the norm of each input.
        outputs: with `norms`, (O,) float32, what each output counts; None for all alike.
        shape: with `norms`, the weight's shape as stored.
        transposed: with `norms`, whether that is I x O.
        seed: seed of mode random.
    """

    mode: Score
    name: str
    delta: Delta | None = None
    norms: Tensor | None = None
    outputs: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    transposed: bool = False
    seed: int = 0

    @property
    def by_magnitude(self) -> bool:
        """Whether the score is |w|, so that the stored weight itself serves as its keys."""
        if self.mode == "wanda":
            return self.norms is None
        return self.mode == "W" or (self.delta is None and self.mode != "random")

    def norm_block(self, start_row: int, stop_row: int, device: torch.device) -> Tensor:
        """The norm of each entry's input, times what its output counts; rows start_row to stop_row as stored.

        They are spread over the rows on the device: from the host only a number for each line goes there.
        """
        assert self.norms is not None
        rows = (self.norms[start_row:stop_row, None] if self.transposed else self.norms).to(device)
        if self.outputs is not None:
            counts = self.outputs if self.transposed else self.outputs[start_row:stop_row, None]
            rows = rows * counts.to(device)
        return rows.expand(stop_row - start_row, self.shape[1])


def scores(mode: Score, weight: Tensor, update: Tensor | None = None, norms: Tensor | None = None) -> Tensor:
    """Scores of some entries under every mode but random.

    Args:
        mode: the score.
        weight: entries of W, any float dtype.
        update: U at the same places, float32; None for a weight without an adapter.
        norms: mode wanda: the norms of the entries' inputs, float32.

    Returns:
        float32, non-negative, in the weight's shape.
    """
    assert mode != "random", "random scores depend on positions: see random_scores"
    reads = SCORES[mode]
    if update is None or reads.update is None:
        found = weight.float().abs()
    else:
        found = (weight.float() + update if reads.weight else update).float().abs()
    if reads.activations:
        assert norms is not None
        found.mul_(norms)
    return found.reciprocal_() if reads.reciprocal and update is not None else found


def sum_of_squares(x_TI: Tensor) -> Tensor:
    """(I,) float64. On a CPU by stretches whose float32 sums stay in its cache, several times as fast as in float64."""
    if x_TI.device.type != "cpu":
        return x_TI.float().square().sum(0, dtype=torch.float64)
    inputs = x_TI.shape[1]
    rows = min(TOKENS_AT_ONCE, max(1, ENTRIES_AT_ONCE // max(1, inputs)))
    total, buffer = torch.zeros(inputs, dtype=torch.float64), torch.empty(rows, inputs)
    for part in x_TI.split(rows):
        wide = buffer[: len(part)].copy_(part)
        total += wide.mul_(wide).sum(0)
    return total


def update_block(mode: Score, delta: Delta, start_row: int, stop_row: int) -> Tensor:
    """The U that a mode scores by, rows start_row to stop_row of the storage layout."""
    block = low_rank_block if SCORES[mode].update == "BA" else delta_block
    return block(delta, start_row, stop_row)


def random_scores(seed: int, name: str, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform scores that depend on seed, parameter name and flat position alone, so not on the world size.

    A counter runs over the flat positions and is hashed (the finaliser of splitmix64, in wrapping int64).

    Returns:
        (numel,) float32, multiples of 2**-24 in [0, 1).
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    x = torch.arange(start, start + numel, dtype=torch.int64, device=device)
    x.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(int.from_bytes(digest, "little")))
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    x.bitwise_xor_(_shift_right(x, 31))
    return _shift_right(x, 40).float().mul_(2.0**-24)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift, where int64 has only the arithmetic one."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def keys(entry_scores: Tensor, weight: Tensor) -> Tensor:
    """int32 keys that order like the scores; 0 exactly where the weight is zero.

    Args:
        entry_scores: float32, non-negative; infinity orders last.
        weight: the stored entries at the same places.
    """
    # Bit arithmetic: comparing with 0 and multiplying by a bool takes twice as long on the CPU.
    bits = weight.view(INTEGERS[weight.element_size()])
    not_zero = bits.bitwise_and(torch.iinfo(bits.dtype).max).clamp_max_(1)
    return entry_scores.contiguous().view(torch.int32).clamp_min(1).mul_(not_zero)


def key_bits(rankings: Iterable[Ranking], dtypes: Iterable[torch.dtype]) -> int:
    """Bits of the keys of one pool: 16 if it is ranked by |w| in one half-precision dtype, else 32."""
    found = set(dtypes)
    half = len(found) == 1 and found <= set(HALF_DTYPES)
    return 16 if half and all(ranking.by_magnitude for ranking in rankings) else 32


def ranked_blocks(
    weight: Tensor,
    start: int,
    ranking: Ranking,
    wants: Callable[[int, int], bool] = lambda start, numel: True,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Stream what `select` needs of one stored stretch of a weight; extra memory: a few blocks.

    The keys of an entry depend on its own stored value and on the adapter only. So a block may be
    zeroed before the next one is asked for, and the result does not depend on where the stretch begins.

    Args:
        weight: (n,) stored entries, a view.
        start: flat position of `weight[0]`.
        ranking: how to rank them.
        wants: called with a block's flat position and length; blocks that it declines are not computed. None
            asks for all.

    Yields:
        (entries, ranked, position): a view of `weight`; its keys, or the view itself where the weight's
        own bits are the keys; the flat position of the first entry.
    """
    if ranking.by_magnitude:
        if weight.numel() and (wants is None or wants(start, weight.numel())):
            yield weight, weight, start
        return
    # Random scores need no rows: one "row" of the flat order is as good a block as any.
    shape = (start + weight.numel(), 1)
    if ranking.norms is not None:
        shape = ranking.shape
    elif ranking.mode != "random" and ranking.delta is not None:
        shape = ranking.delta.storage_shape
    for block in flat_blocks(shape, start, weight.numel(), weight.device):
        if wants is not None and not wants(block.start, block.numel):
            continue
        entries = weight[block.start - start : block.start - start + block.numel]
        if ranking.mode == "random":
            found = random_scores(ranking.seed, ranking.name, block.start, block.numel, weight.device)
        else:
            found = block_scores(ranking, entries, block)
        yield entries, keys(found, entries), block.start


def block_scores(ranking: Ranking, entries: Tensor, block: FlatBlock) -> Tensor:
    """Float32 scores of the part of a block of rows that `entries` are, under every mode but random."""
    rows = (block.start_row, block.stop_row)
    update = norms = None
    if ranking.delta is not None:
        # An offloaded weight lies elsewhere than its adapter.
        update = block.part(update_block(ranking.mode, ranking.delta, *rows)).to(entries.device)
    if ranking.norms is not None:
        norms = block.part(ranking.norm_block(*rows, entries.device))
    return scores(ranking.mode, entries, update, norms)


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite; one pass, no extra memory. Numbers of 8 bits are not looked at."""
    if not values.numel() or not values.is_floating_point() or values.element_size() < 2:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))
