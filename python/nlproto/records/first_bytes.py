# SPDX-License-Identifier: MIT
"""The first bytes of packets, kept until their records have passed."""

from __future__ import annotations

import numpy as np

from nlproto.records.wire import FirstBytesBatch, PacketBytes

__all__ = ["FirstBytes"]


class FirstBytes:
    """Keeps them for the last `limit` packets, or up to twice as many. One thread keeps, any finds.

    A record may have none: they were dropped, or never sent.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._new: dict[tuple[int, int], PacketBytes] = {}
        self._old: dict[tuple[int, int], PacketBytes] = {}

    def keep(self, batch: FirstBytesBatch) -> None:
        """Remember those of one message."""
        for one in batch.first_bytes:
            self._new[int(one.head["cpu"]), int(one.head["seq"])] = one
        if len(self._new) > self._limit:
            self._old, self._new = self._new, {}

    def find(self, record: np.void) -> PacketBytes | None:
        """Return those of one RECORD; None if they are not there."""
        key = int(record["cpu"]), int(record["seq"])
        one = self._new.get(key) or self._old.get(key)
        # sequences begin again with each load of the module, and after 2**32 records
        return one if one is not None and one.head["time_ns"] == record["time_ns"] else None
