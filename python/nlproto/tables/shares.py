# SPDX-License-Identifier: MIT
"""Who gives way when a table is full: whoever has most of it, so that a flood costs its maker.

A row counts against its payer: the owner's uid; for the subordinate uids that /etc/subuid gives
to a user, that user. What nobody owns has a share of its own.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from nlproto._host import ffi, lib
from nlproto.tables.column_table import numbers, octets, random_seed

__all__ = ["NOBODY", "Payers", "level", "surplus"]

NOBODY = 0xFFFFFFFF
"""Payer of rows without an owner; the kernel's invalid uid."""

_SUBUID = "/etc/subuid"
_MAX_SUBUID = 1 << 20  # bytes of it that are read
_MAX_LINE = 1024  # Python refuses to read numbers of more than some thousand digits

Name = TypeVar("Name")


class Payers:
    """From uid to payer, by subuid(5); read again by refresh() when the file has changed.

    Uids that are given to root stay apart from root: containers of others live there. They share
    one payer per line.
    """

    def __init__(self, path: str = _SUBUID) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._ranges = np.empty((0, 3), np.uint64)  # first, last, payer; by first
        self.refresh()

    def refresh(self) -> None:
        """Look at the file again; one that is not there gives nobody anything."""
        try:
            found = os.stat(self._path)
            stamp = found.st_mtime_ns, found.st_ino, found.st_size
            if stamp == self._stamp:
                return
            with open(self._path, "rb") as file:
                lines = file.read(_MAX_SUBUID).split(b"\n")
        except OSError:
            return
        ranges = [one for line in lines if (one := _range(line)) is not None]
        self._ranges = np.array(sorted(ranges), np.uint64).reshape(-1, 3)
        self._stamp = stamp

    def of(self, uids: np.ndarray) -> np.ndarray:
        """Return the payer of each uid, an array of uint32."""
        ranges = self._ranges
        if not len(ranges):
            return uids.astype(np.uint32)
        places = np.searchsorted(ranges[:, 0], uids.astype(np.uint64), side="right") - 1
        inside = (places >= 0) & (uids <= ranges[places, 1])
        return np.where(inside, ranges[places, 2], uids).astype(np.uint32)

    def of_one(self, uid: int | None) -> int:
        """Return the uid that pays for what `uid` has."""
        return NOBODY if uid is None else int(self.of(np.array([uid], np.uint32))[0])


def _range(line: bytes) -> tuple[int, int, int] | None:
    owner, _, rest = line.strip().partition(b":")
    first, _, count = rest.partition(b":")
    if not owner or not first.isdigit() or not count.isdigit() or len(line) > _MAX_LINE:
        return None
    if int(count) == 0:
        return None
    low, high = int(first), int(first) + int(count) - 1
    if high >= NOBODY:
        return None
    try:
        payer = int(owner) if owner.isdigit() else pwd.getpwnam(os.fsdecode(owner)).pw_uid
    except (KeyError, OSError, ValueError):
        payer = low
    return low, high, payer if 0 < payer < NOBODY else low


def level(sizes: Mapping[Name, int], keep: int) -> int:
    """Return the number that each may keep, so that all together keep `keep`.

    Who has less than that keeps all.
    """
    left = keep
    waiting = len(sizes)
    for size in sorted(sizes.values()):
        if size * waiting > left:
            return left // waiting
        left -= size
        waiting -= 1
    return max(sizes.values(), default=0)


def surplus(
    age: np.ndarray, groups: Sequence[np.ndarray], keep: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return a mask of the rows that go, so that rows of weight `keep` stay.

    `age` (n,): the greatest go first. `groups`: arrays (n,) of numbers, the coarsest first, such as
    payer, then payer and program. The greatest group gives rows: of its greatest part the oldest.
    """
    count = len(age)
    goes = np.ones(count, np.uint8)
    ages = np.ascontiguousarray(age, np.int64)
    names = np.empty((len(groups), count), np.uint64)
    for row, group in zip(names, groups, strict=True):
        row[:] = group.astype(np.uint64, copy=False)
    if weights is not None:
        weights = np.ascontiguousarray(weights, np.int64)
    failed = lib.shares_surplus(
        numbers(ages),
        ffi.from_buffer("uint64_t[]", names),
        len(groups),
        ffi.NULL if weights is None else numbers(weights),
        count,
        keep,
        random_seed(),
        octets(goes),
    )
    if failed:
        raise MemoryError
    return goes.view(bool)
