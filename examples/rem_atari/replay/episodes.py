"""The episodes of a replay: which row follows which."""

from __future__ import annotations

import numpy as np

NONE = -1
"""Stands for no row: beyond an episode's edge, and padding."""


class Episodes:
    """Rows linked to those before and after them in their episode.

    Rows of one episode need not be neighbours, because environments take turns. Paths of many rows are walked
    together.

    Args:
        capacity: the largest number of rows.

    Attributes:
        num_rows: rows so far, lost ones included.
        num_episodes: episodes begun, open ones included.
    """

    def __init__(self, capacity: int) -> None:
        self.num_rows = 0
        self.num_episodes = 0
        # The extra last entry is that of row NONE: no row lies beyond an edge.
        self._before = np.zeros(capacity + 1, dtype=np.int64)
        self._after = np.zeros(capacity + 1, dtype=np.int64)
        self._before[NONE] = self._after[NONE] = NONE
        # Steps of the episode before this row; NONE for a row that was lost, which is never sampled.
        self._place = np.zeros(capacity, dtype=np.int64)
        self._open: dict[int, int] = {}  # environment -> last row of its open episode

    def add(self, env_index: int, *, is_last: bool) -> None:
        """The next row continues the open episode of its environment, or begins one; the last row ends it."""
        row = self.num_rows
        before = self._open.get(env_index, NONE)
        self._before[row], self._after[row] = before, NONE
        if before == NONE:
            self.num_episodes += 1
        else:
            self._after[before] = row
            self._place[row] = self._place[before] + 1
        self._open[env_index] = row
        if is_last:
            self.close(env_index)
        self.num_rows += 1

    def lose(self, num_rows: int) -> None:
        """The next rows are lost: they belong to no episode."""
        lost = slice(self.num_rows, self.num_rows + num_rows)
        self._before[lost] = self._after[lost] = self._place[lost] = NONE
        self.num_rows += num_rows

    def open_in(self) -> list[int]:
        """The environments with an open episode."""
        return list(self._open)

    def close(self, env_index: int) -> int:
        """End an environment's open episode; its last row, or NONE without one."""
        return self._open.pop(env_index, NONE)

    def is_lost(self, row: int) -> bool:
        """Whether a row was lost."""
        return bool(self._place[row] == NONE)

    def rows(self, start: int = 0) -> np.ndarray:
        """All rows from `start` on except lost ones, ascending, (n,) int64."""
        return start + np.flatnonzero(self._place[start : self.num_rows] != NONE)

    def rows_with(self, steps: int) -> np.ndarray:
        """All rows that at least so many steps of their episode end with, ascending, (n,) int64."""
        return np.flatnonzero(self._place[: self.num_rows] >= steps - 1)

    def in_order(self) -> np.ndarray:
        """All rows except lost ones, episode after episode, each in the order of its steps: (n,) int64."""
        first = np.arange(self.num_rows)
        for row in np.flatnonzero(self._place[: self.num_rows] > 0):
            first[row] = first[self._before[row]]
        rows = self.rows()
        return rows[np.lexsort((rows, first[rows]))]

    def walk_on(self, rows: np.ndarray, length: int) -> np.ndarray:
        """The first `length` rows of the paths from `rows` (n,) on, NONE after an end: (n, length)."""
        return _walk(self._after, rows, length)

    def walk_back(self, rows: np.ndarray, length: int) -> np.ndarray:
        """The same backwards, NONE before a beginning."""
        return _walk(self._before, rows, length)


def _walk(links: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """The first `length` rows of the paths that begin at `rows` (n,) and follow `links`: (n, length)."""
    path = np.empty((len(rows), length), dtype=np.int64)
    for step in range(length):
        path[:, step] = rows
        rows = links[rows]
    return path
