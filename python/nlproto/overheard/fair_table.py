# SPDX-License-Identifier: MIT
"""A bounded table in which nobody displaces what others have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairTable"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FairTable(Generic[K, V]):
    """About `limit` entries. A full table loses the oldest ones of whoever has most."""

    def __init__(self, limit: int) -> None:
        self.evicted = 0
        self._limit = limit
        self._values: dict[K, tuple[Hashable, V]] = {}
        self._orders: dict[Hashable, OrderedDict[K, None]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[K]:
        return iter(self._values)

    def get(self, key: K) -> V | None:
        """Return the value, if there is one."""
        found = self._values.get(key)
        return None if found is None else found[1]

    def put(self, key: K, value: V, payer: Hashable) -> None:
        """Keep `value`, as the newest of `payer`."""
        before = self._values.get(key)
        if before is not None and before[0] != payer:
            self._remove(key, before[0])
        self._values[key] = payer, value
        order = self._orders.setdefault(payer, OrderedDict())
        order[key] = None
        order.move_to_end(key)
        if len(self._values) > self._limit:
            self._evict()

    def _evict(self) -> None:
        payer, order = max(self._orders.items(), key=lambda item: len(item[1]))
        for key in list(order)[: max(1, min(len(order) - 1, self._limit // 64))]:
            self._remove(key, payer)
            self.evicted += 1

    def _remove(self, key: K, payer: Hashable) -> None:
        del self._values[key]
        order = self._orders[payer]
        del order[key]
        if not order:
            del self._orders[payer]
