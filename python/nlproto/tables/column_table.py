# SPDX-License-Identifier: MIT
"""Tables filled and searched whole batches at a time: columns found by a hash (table.c)."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nlproto._host import ffi, lib

__all__ = ["ColumnTable", "columns_of", "mix", "new_slots", "numbers", "octets"]

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


_NO_FIELDS = np.dtype([])


def new_slots(count: int) -> tuple[np.ndarray, int]:
    """An empty hash index with room for `count`; (slots, how many bits number them)."""
    bits = max(4, (2 * count).bit_length())
    return np.zeros(1 << bits, np.uint32), bits


def columns_of(*dtypes: np.dtype[np.void]) -> np.dtype[np.void]:
    """The fields of all of them."""
    return np.dtype([(name, one[name]) for one in dtypes for name in one.names or ()])


class ColumnTable:
    """Columns of `dtype` for `rows` rows, in which `hash` is made of the fields `key`.

    Not thread-safe. Which rows are in use is up to the owner. A row takes memory when it is first
    written to, so a large table costs nothing while it is empty; trim() gives memory back.
    """

    def __init__(self, dtype: np.dtype[np.void], key: Sequence[str], rows: int) -> None:
        self.capacity = rows
        """How many rows there is room for."""
        self.columns: dict[str, np.ndarray] = {}
        self._key = key
        self._count = 0
        self._memory: dict[str, mmap.mmap] = {}
        for name in dtype.names or ():
            self._add_column(name, dtype[name])
        self._layouts: dict[np.dtype[np.void], Any] = {}
        self._slots = new_slots(0)[0]

    def _add_column(self, name: str, dtype: np.dtype[Any]) -> None:
        size = self.capacity * dtype.itemsize
        memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages, which would waste memory
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory[name] = memory
        flat = np.frombuffer(memory, dtype.base, size // dtype.base.itemsize)
        self.columns[name] = flat.reshape(self.capacity, *dtype.shape)

    def __len__(self) -> int:
        return self._count

    def find(self, values: np.ndarray) -> np.ndarray:
        """For each of `values` the row that has its key, or -1."""
        values = np.ascontiguousarray(values)
        rows = np.empty(len(values), np.int64)
        lib.table_find(self._layout(values.dtype), octets(values), len(values), numbers(rows))
        return rows

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write `values` (any of the fields, `hash` among them) to `rows`; they can be found."""
        if not len(rows):
            return
        if len(rows) != len(values) or rows.min() < 0 or rows.max() >= self.capacity:
            raise IndexError(f"{len(values)} values for {len(rows)} of {self.capacity} rows")
        if 2 * (self._count + len(rows)) > len(self._slots):
            self._enter(self._slots[self._slots != 0] - np.uint32(1), len(rows))
        rows, values = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(values)
        lib.table_put(self._layout(values.dtype), octets(values), len(rows), numbers(rows))
        self._count += len(rows)

    def remove(self, rows: np.ndarray) -> None:
        """They are found no more."""
        rows = np.ascontiguousarray(rows, np.int64)
        self._count -= lib.table_remove(self._layout(), numbers(rows), len(rows))

    def keep(self, mask: np.ndarray) -> None:
        """Of the first len(mask) rows those with `mask` alone, which become the first."""
        mask = np.ascontiguousarray(mask, bool)
        self._count = lib.table_keep(self._layout(), octets(mask), len(mask))
        self._enter(np.arange(self._count))

    def _enter(self, rows: np.ndarray, more: int = 0) -> None:
        """Index `rows` alone, with room for `more`."""
        rows = rows.astype(np.int64)
        self._slots, bits = new_slots(len(rows) + more)
        for layout, _ in self._layouts.values():
            layout.slots, layout.slot_bits = ffi.from_buffer("uint32_t[]", self._slots), bits
        lib.table_enter(self._layout(), numbers(rows), len(rows))

    def trim(self, rows: int) -> None:
        """No row from `rows` on is in use: their memory is given back."""
        for name, column in self.columns.items():
            size = column.itemsize * math.prod(column.shape[1:])
            begin = -(-rows * size // mmap.PAGESIZE) * mmap.PAGESIZE
            if begin < len(self._memory[name]):
                length = len(self._memory[name]) - begin
                self._memory[name].madvise(mmap.MADV_DONTNEED, begin, length)

    def pointers(self, struct: str) -> Any:
        """A C struct of pointers with the columns of the same names; lives as long as this."""
        found = ffi.new(f"{struct} *")
        for name, field in ffi.typeof(struct).fields:
            if name in self._memory:
                setattr(found, name, ffi.cast(field.type, ffi.from_buffer(self._memory[name])))
        return found

    def take(self, rows: np.ndarray, dtype: np.dtype[np.void]) -> np.ndarray:
        """The fields of `dtype` in these rows."""
        found = np.empty(len(rows), dtype)
        for name in dtype.names or ():
            found[name] = self.columns[name][rows]
        return found

    def _layout(self, dtype: np.dtype[np.void] = _NO_FIELDS) -> Any:
        """This table as C sees it, and where values of `dtype` have their fields."""
        if dtype in self._layouts:
            return self._layouts[dtype][0]
        fields: Mapping[str, Any] = dtype.fields or {}
        columns = ffi.new("struct table_column[]", len(self.columns))
        for at, (name, column) in zip(columns, self.columns.items(), strict=True):
            at.data = ffi.from_buffer("uint8_t[]", self._memory[name])
            at.width = column.itemsize * math.prod(column.shape[1:])
            at.key = name in self._key
            if name in fields:
                at.given, at.field = True, fields[name][1]
                if fields[name][0] != np.dtype((column.dtype, column.shape[1:])):
                    raise TypeError(f"{name} is of another type in the table")
        layout = ffi.new("struct table *")
        layout.columns, layout.column_count = columns, len(columns)
        layout.value_size = dtype.itemsize
        layout.value_hash = fields["hash"][1] if fields else 0
        layout.hashes = ffi.from_buffer("uint64_t[]", self.columns["hash"])
        layout.slots = ffi.from_buffer("uint32_t[]", self._slots)
        layout.slot_bits = len(self._slots).bit_length() - 1
        self._layouts[dtype] = layout, columns
        return layout


def numbers(array: np.ndarray) -> Any:
    """int64 for C; lives as long as `array`."""
    return ffi.from_buffer("int64_t[]", array)


def octets(array: np.ndarray) -> Any:
    """Any packed array for C; lives as long as it does."""
    return ffi.from_buffer("uint8_t[]", array)
