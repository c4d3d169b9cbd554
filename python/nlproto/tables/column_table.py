# SPDX-License-Identifier: MIT
"""Tables filled and searched whole batches at a time: columns, found by a hash (table.c)."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nlproto._host import ffi, lib

__all__ = [
    "ColumnTable",
    "mix",
    "new_slots",
    "numbers",
    "octets",
    "part_of",
    "random_seed",
    "with_fields",
    "without",
]

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
    """Return one hash (uint64) for each row of up to eight columns of equal length.

    With a random `seed` a sender of packets cannot foresee which rows collide.
    """
    value = np.full(len(parts[0]), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part, odd in zip(parts, _ODD, strict=False):
        value = (value ^ part) * odd
        value ^= value >> _SHIFT
    return value


_NO_FIELDS = np.dtype([])


def new_slots(count: int) -> tuple[np.ndarray, int]:
    """Return an empty hash index for `count` rows: slots (uint32), bits of a slot's number."""
    bits = max(4, (2 * count).bit_length())
    return np.zeros(1 << bits, np.uint32), bits


def random_seed() -> int:
    """Return 64 random bits. (The module `secrets` would take 3 MB of memory.)"""
    return int.from_bytes(os.urandom(8), "little")


def part_of(dtype: np.dtype[np.void], *names: str) -> np.dtype[np.void]:
    """Return the fields from the first to the last of `names`, which are adjacent, as a group."""
    fields: Mapping[str, Any] = dtype.fields or {}
    begin = fields[names[0]][1]
    ends = [fields[name][1] + fields[name][0].itemsize for name in names]
    return np.dtype(
        {
            "names": names,
            "formats": [fields[name][0] for name in names],
            "offsets": [fields[name][1] - begin for name in names],
            "itemsize": -(-(max(ends) - begin) // 8) * 8,
        }
    )


def with_fields(dtype: np.dtype[np.void], *more: tuple[str, Any, int]) -> np.dtype[np.void]:
    """Return the same layout, in which `bytes` have a further name, format and offset."""
    fields: dict[str, Any] = {name: field[:2] for name, field in (dtype.fields or {}).items()}
    fields |= {name: (kind, offset) for name, kind, offset in more}
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": dtype.itemsize,
        }
    )


def without(dtype: np.dtype[np.void], *names: str) -> np.dtype[np.void]:
    """Return the same layout without the names `names`."""
    return dtype[[name for name in dtype.names or () if name not in names]]


class ColumnTable:
    """A table of `rows` rows with the columns `groups`, found by the `hash` of the fields `key`.

    A group's fields lie side by side, as in the values written here. So what is used together
    takes one access to memory. Within a group the fields of the key come first. Not thread-safe.
    The owner decides which rows are in use. A row takes memory when it is first written to, so an
    empty table costs nothing, however large. trim() gives memory back.
    """

    def __init__(self, groups: Sequence[np.dtype[np.void]], key: Sequence[str], rows: int) -> None:
        self.capacity = rows
        """How many rows there is room for."""
        self._hashes = _reserve(4 * rows)
        self._memory = [_reserve(group.itemsize * rows) for group in groups]
        self.groups = [
            np.ndarray(rows, group, memory)
            for group, memory in zip(groups, self._memory, strict=True)
        ]
        self.columns: dict[str, np.ndarray] = {
            name: group[name] for group in self.groups for name in group.dtype.names or ()
        }
        self._key = key
        self._count = 0
        self._layouts: dict[np.dtype[np.void], Any] = {}
        self._slots = new_slots(0)[0]

    def __len__(self) -> int:
        return self._count

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return for each of `values` the row (int64) with its key, or -1."""
        values = np.ascontiguousarray(values)
        rows = np.empty(len(values), np.int64)
        lib.table_find(self._layout(values.dtype), octets(values), len(values), numbers(rows))
        return rows

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write `values` (any fields, and `hash`) to `rows`, and enter the rows into the index."""
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
        """Take rows out of the index."""
        rows = np.ascontiguousarray(rows, np.int64)
        self._count -= lib.table_remove(self._layout(), numbers(rows), len(rows))

    def keep(self, mask: np.ndarray) -> None:
        """Of the first len(mask) rows keep those with `mask`, and move them to the front."""
        mask = np.ascontiguousarray(mask, bool)
        self._count = lib.table_keep(self._layout(), octets(mask), len(mask))
        self._enter(np.arange(self._count))

    def _enter(self, rows: np.ndarray, more: int = 0) -> None:
        """Index only `rows`, with room for `more`."""
        rows = rows.astype(np.int64)
        self._slots, bits = new_slots(len(rows) + more)
        for layout, _ in self._layouts.values():
            layout.slots, layout.slot_bits = ffi.from_buffer("uint32_t[]", self._slots), bits
        lib.table_enter(self._layout(), numbers(rows), len(rows))

    def trim(self, rows: int) -> None:
        """No row from `rows` on is in use: give their memory back."""
        for group, memory in zip(self.groups, self._memory, strict=True):
            begin = -(-rows * group.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
            if begin < len(memory):
                memory.madvise(mmap.MADV_DONTNEED, begin, len(memory) - begin)

    def take(self, rows: np.ndarray, dtype: np.dtype[np.void]) -> np.ndarray:
        """Return the fields of `dtype` in these rows; 0 where there is no such column (`hash`)."""
        found = np.zeros(len(rows), dtype)
        for name in dtype.names or ():
            if name in self.columns:
                found[name] = self.columns[name][rows]
        return found

    def _layout(self, dtype: np.dtype[np.void] = _NO_FIELDS) -> Any:
        """Return this table for C, with the offsets of its fields in values of `dtype`."""
        if dtype in self._layouts:
            return self._layouts[dtype][0]
        fields: Mapping[str, Any] = dtype.fields or {}
        columns = ffi.new("struct table_column[]", len(self.groups))
        for at, group in zip(columns, self.groups, strict=True):
            at.data, at.width = octets(group), group.itemsize
            for name, (kind, offset, *_) in (group.dtype.fields or {}).items():
                end = offset + kind.itemsize
                if name in self._key:
                    at.compared = max(at.compared, end)
                if name not in fields:
                    continue
                begin = fields[name][1] - offset
                if fields[name][0] != kind or (at.given and begin != at.field):
                    raise TypeError(f"{name} lies elsewhere in the table")
                at.given, at.field = max(at.given, end), begin
        layout = ffi.new("struct table *")
        layout.columns, layout.column_count = columns, len(columns)
        layout.value_size = dtype.itemsize
        layout.value_hash = fields["hash"][1] if fields else 0
        layout.hashes = ffi.from_buffer("uint32_t[]", self._hashes)
        layout.slots = ffi.from_buffer("uint32_t[]", self._slots)
        layout.slot_bits = len(self._slots).bit_length() - 1
        self._layouts[dtype] = layout, columns
        return layout


def _reserve(size: int) -> mmap.mmap:
    """Return zeros that take no memory yet."""
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages, which would waste memory
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def numbers(array: np.ndarray) -> Any:
    """Return int64 for C, valid as long as `array`."""
    return ffi.from_buffer("int64_t[]", array)


def octets(array: np.ndarray) -> Any:
    """Return any packed array for C, valid as long as the array."""
    return ffi.from_buffer("uint8_t[]", array)
