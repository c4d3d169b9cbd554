# SPDX-License-Identifier: MIT
"""The bounded queue between the receiver and the worker."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["MessageQueue"]

T = TypeVar("T")


class MessageQueue(Generic[T]):
    """Holds whole messages up to `max_bytes`. When it is full, the oldest is dropped and counted.

    An empty queue accepts any message, however large, so that progress never stops. Messages with
    `size` 0 (markers) are never dropped. For any number of threads.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError("max_bytes must be positive")
        self._items: deque[tuple[T, int, int]] = deque()
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self.max_bytes = max_bytes
        self.bytes = 0
        self.peak_bytes = 0
        self.dropped_messages = 0
        self.dropped_records = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        """Whether it refuses new messages."""
        return self._closed

    def put(self, item: T, size: int, records: int = 0) -> int:
        """Append a message. Returns how many records of older messages were dropped for it.

        After close() the message itself is dropped and counted.
        """
        lost = 0
        with self._ready:
            if self._closed:
                self.dropped_messages += 1
                self.dropped_records += records
                return records
            while size and self.bytes + size > self.max_bytes:
                dropped = self._drop_oldest()
                if dropped is None:
                    break
                lost += dropped
            self._items.append((item, size, records))
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            self.dropped_records += lost
            self._ready.notify()
        return lost

    def _drop_oldest(self) -> int | None:
        """How many records the oldest message has that may be dropped; None if there is none."""
        for index, (_, size, records) in enumerate(self._items):
            if size:
                del self._items[index]
                self.bytes -= size
                self.dropped_messages += 1
                return records
        return None

    def get(self, timeout: float | None = None) -> T | None:
        """Return the oldest message; None after `timeout` s, or if closed and empty."""
        items = self.get_many(1, timeout)
        return items[0] if items else None

    def get_many(self, max_messages: int, timeout: float | None = None) -> list[T]:
        """Return up to `max_messages`, oldest first; none after `timeout` s, or at the end."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._closed, timeout)
            taken: list[T] = []
            while self._items and len(taken) < max_messages:
                item, size, _ = self._items.popleft()
                self.bytes -= size
                taken.append(item)
            return taken

    def close(self) -> None:
        """Refuse new messages. Those inside can still be taken."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
