# SPDX-License-Identifier: MIT
"""The first bytes of packets, kept until their records have come by."""

from __future__ import annotations

import numpy as np

from nlproto.records.wire import Snap, SnapBatch

__all__ = ["FirstBytes"]


class FirstBytes:
    """The last `limit` snaps or more, at most twice as many; one thread keeps, any finds.

    A record whose snap is gone, or was never sent, has none: whoever asks must do without.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._new: dict[tuple[int, int], Snap] = {}
        self._old: dict[tuple[int, int], Snap] = {}

    def keep(self, batch: SnapBatch) -> None:
        """Remember the snaps of one message."""
        for snap in batch.snaps:
            self._new[int(snap.head["cpu"]), int(snap.head["seq"])] = snap
        if len(self._new) > self._limit:
            self._old, self._new = self._new, {}

    def find(self, record: np.void) -> Snap | None:
        """Return the snap of one RECORD."""
        key = int(record["cpu"]), int(record["seq"])
        snap = self._new.get(key) or self._old.get(key)
        # sequences begin anew with each load of the module, and after 2**32 records
        return snap if snap is not None and snap.head["time_ns"] == record["time_ns"] else None
