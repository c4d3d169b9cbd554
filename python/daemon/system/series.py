# SPDX-License-Identifier: MIT
"""Sums of one family of metrics by labels. Nobody's names push out those of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

__all__ = ["Labels", "Series"]

Labels = tuple[str, ...]

_OTHER = "other"
_ROOT = 0
_MOST_UIDS = 4096
"""Uids whose payer is remembered."""


class Series:
    """Sums by labels. Beyond a limit labels count as "other".

    Each label counts against the payer (nlproto.tables.shares) whose process had it first. In a
    full family the payer with most labels gives one to a payer with fewer. It is the label with the
    smallest sum of the columns `bytes_at`. Root gives none.
    """

    def __init__(self, bytes_at: tuple[int, ...], payer_of: Callable[[int | None], int]) -> None:
        self.sums: dict[Labels, np.ndarray] = {}
        self.reasons: dict[Labels, Counter[str]] = {}
        self._bytes_at = list(bytes_at)
        self._payer_of = payer_of
        self._known: dict[int | None, int] = {}
        self._payers: dict[Labels, int] = {}
        self._counts: Counter[int] = Counter()

    def add(self, labels: Labels, values: np.ndarray, uid: int | None, most: int) -> None:
        """Add to the sums of `labels`; at most `most` have sums of their own."""
        labels = self._within(labels, uid, most)
        known = self.sums.get(labels)
        self.sums[labels] = values.copy() if known is None else known + values

    def add_reason(
        self, labels: Labels, reason: str, count: int, uid: int | None, most: int
    ) -> None:
        """Add to how often there was a reason."""
        labels = self._within(labels, uid, most)
        self.reasons.setdefault(labels, Counter())[reason] += count

    def _within(self, labels: Labels, uid: int | None, most: int) -> Labels:
        """Return these labels, or those of all others if there are too many."""
        if labels in self._payers:
            return labels
        payer = self._known.get(uid)
        if payer is None:
            if len(self._known) >= _MOST_UIDS:
                self._known.clear()
            payer = self._known[uid] = self._payer_of(uid)
        if len(self._payers) < most or self._make_room(payer):
            self._payers[labels] = payer
            self._counts[payer] += 1
            return labels
        return _other(labels)

    def _make_room(self, payer: int) -> bool:
        mine = self._counts[payer]
        if payer != _ROOT and mine * len(self._counts) >= len(self._payers):
            return False
        giver, count = max(
            ((one, count) for one, count in self._counts.items() if one != _ROOT),
            key=lambda one: one[1],
            default=(_ROOT, 0),
        )
        if giver == payer or count <= (1 if payer == _ROOT else mine + 1):
            return False
        self._give_up(min((one for one, of in self._payers.items() if of == giver), key=self._size))
        return True

    def _size(self, labels: Labels) -> int:
        sums = self.sums.get(labels)
        return 0 if sums is None else int(sums[self._bytes_at].sum())

    def _give_up(self, labels: Labels) -> None:
        payer, other = self._payers.pop(labels), _other(labels)
        self._counts[payer] -= 1
        if (sums := self.sums.pop(labels, None)) is not None:
            self.sums[other] = self.sums.get(other, 0) + sums
        if (reasons := self.reasons.pop(labels, None)) is not None:
            self.reasons.setdefault(other, Counter()).update(reasons)


def _other(labels: Labels) -> Labels:
    return (_OTHER,) + ("",) * (len(labels) - 1)
