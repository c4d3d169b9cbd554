# SPDX-License-Identifier: MIT
"""Names of far ends as numbers of 64 bits, for which a flow has room, in memory and in files.

The number depends on the name alone, so it means the same in every file and every run.
"""

from __future__ import annotations

import threading
from _blake2 import blake2b  # hashlib would load OpenSSL: 3.5 MB of memory
from collections import OrderedDict

__all__ = ["SEPARATOR", "NumberedNames", "is_of_resolver", "number_of"]

SEPARATOR = "|"
"""Separates the names of one address that a resolver asked for: nobody knows which is meant."""
_LIMIT = 1 << 16


def is_of_resolver(number: int) -> bool:
    """Return whether a resolver asked for the name; users with limited rights may not see it."""
    return bool(number & 1)


def number_of(name: str, of_resolver: bool = False) -> int:
    """Return the number of a name, never 0."""
    number = int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) & ~1
    return (number or 2) | of_resolver


class NumberedNames:
    """The last `limit` names used. Thread-safe."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._texts: OrderedDict[int, str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def number(self, name: str, of_resolver: bool = False) -> int:
        """Return the number of `name`, and keep the name; 0 for no name."""
        if not name:
            return 0
        number = number_of(name, of_resolver)
        with self._lock:
            self._texts[number] = name
            self._texts.move_to_end(number)
            if len(self._texts) > self._limit:
                self._texts.popitem(last=False)
        return number

    def text(self, number: int) -> str:
        """Return the name; "" if it is no longer known."""
        return self._texts.get(number, "")
