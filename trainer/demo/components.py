"""Connected components of a boolean mask, by runs of pixels: numpy only, about a millisecond."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the 4-connected components of a mask [H, W].

    Returns int32 labels [H, W], 0 outside the mask and 1..count inside, and the count.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    parents = _join_runs(rows.tolist(), starts.tolist(), ends.tolist())
    roots = np.array([_root(parents, i) for i in range(len(parents))], dtype=np.int64)
    names, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros((height, width), dtype=np.int32)
    labels[mask] = np.repeat(numbers.astype(np.int32) + 1, ends - starts)
    return labels, len(names)


def _root(parents: list[int], run: int) -> int:
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run


def _join_runs(rows: list[int], starts: list[int], ends: list[int]) -> list[int]:
    """Union-find over runs in row order: runs of adjacent rows that share a column are one."""
    parents = list(range(len(rows)))
    above = 0
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run]):
            above += 1
        candidate = above
        while rows[candidate] == row - 1 and starts[candidate] < ends[run]:
            parents[_root(parents, candidate)] = _root(parents, run)
            candidate += 1
    return parents
