# SPDX-License-Identifier: MIT
"""Questions that sockets of this machine have sent to DNS servers and that wait for an answer.

Whoever guesses a socket's port can send it an answer. So an answer counts only if its transaction
ID, name and type are those of a question, and only once.
"""

from __future__ import annotations

from collections import OrderedDict

from nlproto.overheard.dns import DnsQuestion
from nlproto.records.ends import Way

__all__ = ["DnsQuestions"]

_LIMIT = 1 << 15
"""More than a ring holds in the 5 s that a resolver waits as a rule."""
_LASTS_NS = 30_000_000_000


class DnsQuestions:
    """The last `limit` questions, for 30 s each."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._asked: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._asked)

    def note(self, way: Way, question: DnsQuestion, time_ns: int) -> None:
        """The local end of `way` asked."""
        key = hash((way, question))
        self._asked[key] = time_ns
        self._asked.move_to_end(key)
        if len(self._asked) > self._limit:
            self._asked.popitem(last=False)

    def take(self, way: Way, question: DnsQuestion, time_ns: int) -> bool:
        """Return whether an answer to this question was still missing. Now it is not."""
        asked_ns = self._asked.pop(hash((way, question)), None)
        return asked_ns is not None and time_ns - asked_ns < _LASTS_NS
