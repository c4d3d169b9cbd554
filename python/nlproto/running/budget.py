# SPDX-License-Identifier: MIT
"""Rations costly work to a share of the time, with some saved up for bursts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Budget"]


class Budget:
    """Work may take one `share`th of the time; up to `saved_ns` of it can be saved while idle."""

    def __init__(self, share: int, saved_ns: int, now_ns: Callable[[], int]) -> None:
        self._share = share
        self._saved_ns = saved_ns
        self._now_ns = now_ns
        self._left_ns = saved_ns
        self._at_ns = now_ns()

    def allows(self) -> bool:
        """Return whether work may begin now."""
        now = self._now_ns()
        self._left_ns = min(self._saved_ns, self._left_ns + (now - self._at_ns) // self._share)
        self._at_ns = now
        return self._left_ns > 0

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Charge the time that the block takes, allowed or not."""
        began = self._now_ns()
        try:
            yield
        finally:
            self._left_ns -= self._now_ns() - began
