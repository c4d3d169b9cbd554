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

__all__ = ["NOBODY", "Payers", "level", "surplus"]

NOBODY = 0xFFFFFFFF
"""Payer of rows without an owner; the kernel's invalid uid."""

_SUBUID = "/etc/subuid"
_MAX_SUBUID = 1 << 20  # bytes of it that are read

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
        """The payer (uint32) of each uid."""
        ranges = self._ranges
        if not len(ranges):
            return uids.astype(np.uint32)
        places = np.searchsorted(ranges[:, 0], uids.astype(np.uint64), side="right") - 1
        inside = (places >= 0) & (uids <= ranges[places, 1])
        return np.where(inside, ranges[places, 2], uids).astype(np.uint32)

    def of_one(self, uid: int | None) -> int:
        return NOBODY if uid is None else int(self.of(np.array([uid], np.uint32))[0])


def _range(line: bytes) -> tuple[int, int, int] | None:
    owner, _, rest = line.strip().partition(b":")
    first, _, count = rest.partition(b":")
    if not owner or not first.isdigit() or not count.isdigit() or int(count) == 0:
        return None
    low, high = int(first), int(first) + int(count) - 1
    if high >= NOBODY:
        return None
    try:
        payer = int(owner) if owner.isdigit() else pwd.getpwnam(os.fsdecode(owner)).pw_uid
    except (KeyError, OSError):
        payer = low
    return low, high, payer if 0 < payer < NOBODY else low


def level(sizes: Mapping[Name, int], keep: int) -> int:
    """What each may have at most so that all together have `keep`; the small ones keep all."""
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
    """True for the rows that go so that rows of weight `keep` stay.

    `age`: the greatest go first. `groups`: numbers, the coarsest first, such as payer, then payer
    and program: the greatest group gives, in it the greatest part of it, of that the oldest rows.
    """
    weight = np.ones(len(age), np.int64) if weights is None else weights.astype(np.int64)
    place = age
    for group in reversed(groups):
        rows = np.lexsort((age, place, group))
        sums = np.cumsum(weight[rows])
        starts = np.flatnonzero(np.diff(group[rows], prepend=group[rows[:1]]) != 0)
        starts = np.concatenate(([0], starts)).astype(np.intp)
        before = np.concatenate(([0], sums[starts[1:] - 1]))
        sums -= np.repeat(before, np.diff(np.append(starts, len(rows))))
        place = np.empty(len(age), np.int64)
        place[rows] = sums
    rows = np.lexsort((age, place))
    goes = np.ones(len(age), bool)
    goes[rows[np.cumsum(weight[rows]) <= keep]] = False
    return goes
