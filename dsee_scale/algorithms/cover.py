"""S2 as ranks of a low-rank update: a smallest set of rows and columns that holds all of its entries.

Every row or column of the set costs one rank, so a LoRA of rank r + k is BA + S2 exactly. The set is smallest by
Konig's theorem: in the graph whose edges are the entries, between rows and columns, it is as large as a largest
matching, and is read off one: of the vertices that alternating paths from unmatched rows reach, the columns; of
the others, the rows.

Shapes: O outputs, I inputs, R rank, K slices, N entries of S2 in all, k rows and columns of the cover.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsee_scale.algorithms.delta import Delta


@dataclass(frozen=True, eq=False)
class Cover:
    """Rows and columns that hold every entry.

    Attributes:
        rows: int64, ascending.
        cols: int64, ascending.
    """

    rows: Tensor
    cols: Tensor

    @property
    def size(self) -> int:
        """k, the ranks that it takes."""
        return len(self.rows) + len(self.cols)


def smallest_cover(rows: Tensor, cols: Tensor) -> Cover:
    """A smallest set of rows and columns that covers the positions.

    Args:
        rows: (N,) integers, output index of each entry; N may be 0.
        cols: (N,) integers, input index of each entry. A position may occur more than once.

    Returns:
        The cover, on the CPU; the same one for the same positions.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    all_rows, row_of = rows.long().cpu().unique(return_inverse=True)
    all_cols, col_of = cols.long().cpu().unique(return_inverse=True)
    if not len(all_rows):
        return Cover(all_rows, all_cols)
    edges = torch.stack([row_of, col_of], dim=1).unique(dim=0)
    # scipy before 1.12 matches 32-bit positions alone, and from torch's it makes wider ones.
    entries = (torch.ones(len(edges)).numpy(), tuple(edges.int().t().numpy()))
    graph = csr_array(entries, shape=(len(all_rows), len(all_cols)))
    col_of_row = torch.as_tensor(maximum_bipartite_matching(graph, perm_type="column"), dtype=torch.int64)
    seen_rows, seen_cols = _reachable(edges, col_of_row, len(all_cols))
    return Cover(all_rows[~seen_rows], all_cols[seen_cols])


def _reachable(edges: Tensor, col_of_row: Tensor, num_cols: int) -> tuple[Tensor, Tensor]:
    """Rows and columns (bool) that alternating paths from unmatched rows reach: out by any entry, back by a match."""
    seen_rows = col_of_row < 0
    seen_cols = torch.zeros(num_cols, dtype=torch.bool)
    row_of_col = torch.full((num_cols,), -1)
    matched = (col_of_row >= 0).nonzero().flatten()
    row_of_col[col_of_row[matched]] = matched
    while True:
        found = edges[seen_rows[edges[:, 0]], 1].unique()
        fresh = found[~seen_cols[found]]
        if not len(fresh):
            return seen_rows, seen_cols
        seen_cols[fresh] = True
        back = row_of_col[fresh]
        seen_rows[back[back >= 0]] = True


def as_low_rank(delta: Delta, cover: Cover, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors of B A + S2, without the scaling.

    Args:
        delta: D of one weight.
        cover: of its positions.
        rank: rank to pad to with zeros, at least K*R + k; None pads nothing.

    Returns:
        A (rank, I) and B (O, rank) in the delta's dtype: its own ranks, slice by slice, then the cover's rows, then
        its columns. An entry in both a row and a column of the cover goes with the row.
    """
    spec = delta.spec
    outputs, inputs = spec.shape
    own = delta.a.shape[0]
    rank = own + cover.size if rank is None else rank
    assert rank >= own + cover.size, (rank, own, cover.size)
    a, b = delta.a.new_zeros(rank, inputs), delta.a.new_zeros(outputs, rank)
    a[:own] = delta.a
    for start, stop, of_a, of_b in spec.per_slice():
        b[start:stop, of_a] = delta.b[of_b]
    rows, cols = delta.rows.long(), delta.cols.long()
    covered_rows, covered_cols = cover.rows.to(rows.device), cover.cols.to(rows.device)
    first = own + len(covered_rows)
    b[covered_rows, torch.arange(own, first, device=rows.device)] = 1
    a[torch.arange(first, first + len(covered_cols), device=rows.device), covered_cols] = 1
    by_row = torch.isin(rows, covered_rows)
    at_row = own + torch.searchsorted(covered_rows, rows[by_row])
    a.index_put_((at_row, cols[by_row]), delta.values[by_row], accumulate=True)
    at_col = first + torch.searchsorted(covered_cols, cols[~by_row])
    b.index_put_((rows[~by_row], at_col), delta.values[~by_row], accumulate=True)
    return a, b
