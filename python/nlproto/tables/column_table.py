# SPDX-License-Identifier: MIT
"""Tables that are filled and searched whole batches at a time: NumPy columns, found by a hash."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

__all__ = ["ColumnTable", "mix"]

_ODD = [
    np.uint64(value)
    for value in (
        0x9E3779B97F4A7C15,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
        0xE7037ED1A0B428DB,
        0x8EBC6AF09C88C6E3,
        0x589965CC75374CC3,
    )
]
_SHIFT = np.uint64(29)


def mix(parts: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """One 64-bit hash for each element of up to eight columns.

    With a random `seed` a sender of packets cannot foresee which of them collide.
    """
    value = np.full(len(parts[0]), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part, odd in zip(parts, _ODD, strict=False):
        value = (value ^ part) * odd
        value ^= value >> _SHIFT
    return value


class ColumnTable:
    """Columns of `dtype`, in which `hash` is made of the fields `key`. Not thread-safe.

    Which rows are in use is up to the owner.
    """

    def __init__(self, dtype: np.dtype[np.void], key: Sequence[str]) -> None:
        self._key = key
        self._rows: dict[int, int] = {}
        self.columns = {
            name: np.zeros((0, *dtype[name].shape), dtype[name].base) for name in dtype.names or ()
        }

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
        return len(self.columns["hash"])

    def grow(self, rows: int) -> None:
        for name, old in self.columns.items():
            column = np.zeros((rows, *old.shape[1:]), old.dtype)
            column[: len(old)] = old
            self.columns[name] = column

    def find(self, values: np.ndarray) -> np.ndarray:
        """For each of `values` the row that has its key, or -1."""
        found = map(self._rows.get, values["hash"].tolist(), itertools.repeat(-1))
        rows = np.fromiter(found, np.int64, len(values))
        known = np.flatnonzero(rows >= 0)
        if len(known):
            other = np.zeros(len(known), bool)
            for name in self._key:
                differs = self.columns[name][rows[known]] != values[name][known]
                other |= differs.any(axis=1) if differs.ndim == 2 else differs
            rows[known[other]] = -1
        return rows

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write `values` (any of the fields, `hash` among them) to `rows`; they can be found."""
        for name in values.dtype.names or ():
            self.columns[name][rows] = values[name]
        self._rows.update(zip(values["hash"].tolist(), rows.tolist(), strict=True))

    def remove(self, rows: np.ndarray) -> None:
        """They are found no more."""
        known = self._rows
        for number, row in zip(self.columns["hash"][rows].tolist(), rows.tolist(), strict=True):
            if known.get(number) == row:
                del known[number]

    def keep(self, rows: np.ndarray) -> None:
        """These rows alone, which become the first."""
        for column in self.columns.values():
            column[: len(rows)] = column[rows]
        hashes = self.columns["hash"][: len(rows)].tolist()
        self._rows = dict(zip(hashes, range(len(rows)), strict=True))

    def take(self, rows: np.ndarray, dtype: np.dtype[np.void]) -> np.ndarray:
        """The fields of `dtype` in these rows."""
        found = np.empty(len(rows), dtype)
        for name in dtype.names or ():
            found[name] = self.columns[name][rows]
        return found
