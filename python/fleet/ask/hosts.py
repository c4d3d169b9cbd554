# SPDX-License-Identifier: MIT
"""The machines, and which of them were silent or lost records in a range of time."""

from __future__ import annotations

from dataclasses import dataclass

from fleet.ask.store import FlowStore

__all__ = ["Host", "hosts_of"]

_SILENT_NS = 120 * 10**9
"""A machine that sent no account for so long was silent."""
_UNREAD_NS = 10**9
"""So long nobody may read a daemon: its exporter was started again."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine's own accounts of the range."""

    name: str
    silent_s: float
    """The longest time without an account or without a reader of its daemon; 0 if the first was
    under two minutes and the second under one second."""
    lost: int
    """Rows that its exporter lost, and records that its daemon lost."""

    @property
    def whole(self) -> bool:
        """Whether everything that happened there is known."""
        return not self.silent_s and not self.lost


_QUERY = """
WITH told AS (
    SELECT host, boot, at_ns, lost, daemon_lost, dropped, gap_ms,
        at_ns - lag(at_ns, 1, $since) OVER (PARTITION BY host ORDER BY at_ns) AS gap
    FROM account),
each AS (
    SELECT host, boot, max(gap) AS gap, max(at_ns) AS last,
        max(lost) - min(lost) AS lost, max(daemon_lost) - min(daemon_lost) AS daemon_lost,
        max(dropped) - min(dropped) AS dropped, max(gap_ms) - min(gap_ms) AS unread_ms
    FROM told GROUP BY host, boot)
SELECT host, greatest(max(gap), $until - max(last)) AS gap,
    coalesce(sum(lost + daemon_lost + dropped), 0)::BIGINT AS lost,
    coalesce(max(unread_ms), 0)::BIGINT * 1000000 AS unread
FROM each GROUP BY host
"""


def hosts_of(store: FlowStore) -> list[Host]:
    """Return every machine that sent anything in the hours around the range."""
    if store.alone:
        return []
    if store.hosts is None:
        store.hosts = _hosts(store)
    hosts: list[Host] = store.hosts
    return hosts


def _hosts(store: FlowStore) -> list[Host]:
    range = store.range
    words = {"since": range.since_ns, "until": range.until_ns}
    told = {row["host"]: row for row in store.rows(_QUERY, words)}
    found = []
    for name in sorted(store.known_hosts | told.keys()):
        row = told.get(name)
        gap = range.until_ns - range.since_ns if row is None else row["gap"]
        unread = 0 if row is None else row["unread"]
        gap = max(
            gap if row is None or gap > _SILENT_NS else 0, unread if unread > _UNREAD_NS else 0
        )
        silent = gap / 1e9
        found.append(Host(name, silent, 0 if row is None else row["lost"]))
    return found
