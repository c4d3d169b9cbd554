# SPDX-License-Identifier: MIT
"""Remembers who began connections: only a connection's first sums have its SYN."""

from __future__ import annotations

import numpy as np

from nlproto.records.wire import taken
from nlproto.tables.column_table import ColumnTable

__all__ = ["Beginners"]

_REMEMBERED = 1 << 17
"""Connections; at most twice as many."""
_AT_ONCE = 1 << 14
_ROW = np.dtype(
    {"names": ["key", "opened"], "formats": ["<u8", "u1"], "offsets": [0, 8], "itemsize": 16}
)
_VALUE = np.dtype([("key", "<u8"), ("opened", "u1"), ("", "V3"), ("hash", "<u4")])


class Beginners:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._table = self._before = _empty()
        """Older ones apart."""

    def recall(self, keys: np.ndarray, opened: np.ndarray) -> None:
        """Remember `opened` by random `keys` (uint64), and set it where it is 0."""
        for at in range(0, len(keys), _AT_ONCE):
            self._recall(keys[at : at + _AT_ONCE], opened[at : at + _AT_ONCE])

    def _recall(self, keys: np.ndarray, opened: np.ndarray) -> None:
        if len(self._table) + len(keys) > _REMEMBERED:
            self._before, self._table = self._table, _empty()
        values = np.empty(len(keys), _VALUE)
        values["key"], values["hash"], values["opened"] = keys, keys, opened
        says = opened != 0
        rows = self._table.find(values)
        known = rows >= 0
        self._table.columns["opened"][rows[known & says]] = opened[known & says]
        opened[known & ~says] = self._table.columns["opened"][rows[known & ~says]]
        new = np.flatnonzero(says & ~known)
        self._table.put(np.arange(len(new)) + len(self._table), taken(values, new))
        silent = np.flatnonzero(~says & ~known)
        if len(silent) and len(self._before):
            rows = self._before.find(taken(values, silent))
            opened[silent[rows >= 0]] = self._before.columns["opened"][rows[rows >= 0]]


def _empty() -> ColumnTable:
    return ColumnTable([_ROW], ("key",), _REMEMBERED)
