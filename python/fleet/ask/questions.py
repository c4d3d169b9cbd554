# SPDX-License-Identifier: MIT
"""Who, how much, and what is new: questions to the flows of all machines."""

from __future__ import annotations

from typing import Any

from fleet.ask.store import REMOTE, FlowStore
from fleet.ask.wanted import NAMED, Wanted, condition

__all__ = ["NEW", "USED_BY", "new", "usage", "who"]

USED_BY = {
    "process": "coalesce(program, comm)",
    "host": "host",
    "unit": "unit",
    "container": "coalesce(container_name, container)",
    "pod": "pod",
    "user": '"user"',
    "domain": "domain",
}
"""What `usage` sums up by, and the column."""

NEW = {
    "destination": ("program, remote, service", "client"),
    "program": ("program", "true"),
    "listener": ("program, service", "NOT client"),
}
"""Kinds of news: the columns that name it, beside the machine; and its flows."""

_SUMS = """count(*)::BIGINT AS rows, sum(packets_out)::BIGINT AS packets_out,
    sum(bytes_out)::BIGINT AS bytes_out, sum(packets_in)::BIGINT AS packets_in,
    sum(bytes_in)::BIGINT AS bytes_in, min(first_ns) AS first_ns, max(last_ns) AS last_ns"""

_BEGINS = "how = 'listener' AND (packets_in = 0 OR packets_out = 0)"
"""The first packets of a connection, which one machine's history has beside the others."""


def who(store: FlowStore, wanted: Wanted, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """Return how many flows fit, and the `limit` seen last."""
    fits, words = condition(store, wanted)
    rows = store.rows(
        f"""
        WITH named AS ({NAMED}),
        one AS (
            SELECT host, boot, netns, cookie, protocol, laddr, lport, raddr, rport, forwarded, tgid,
                start_ns, any_value(program) AS program, any_value(comm) AS comm,
                any_value(uid) AS uid, any_value("user") AS "user", any_value(unit) AS unit,
                any_value(container) AS container, any_value(container_name) AS container_name,
                any_value(pod) AS pod, any_value(exe) AS exe, any_value(client) AS client,
                arg_max(how, last_ns) AS how, bit_or(flags) AS flags,
                max(domain) AS domain, max(nat_laddr) AS nat_laddr, max(nat_lport) AS nat_lport,
                max(nat_raddr) AS nat_raddr, max(nat_rport) AS nat_rport, {_SUMS}
            FROM named WHERE {fits} GROUP BY ALL)
        SELECT *, count(*) OVER () AS total FROM one ORDER BY last_ns DESC LIMIT {int(limit)}
        """,
        words,
    )
    total = rows[0].pop("total") if rows else 0
    for row in rows[1:]:
        del row["total"]
    return total, rows


def usage(
    store: FlowStore, wanted: Wanted, by: str, limit: int
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many names there are, and those with most bytes. `by`: of USED_BY."""
    fits, words = condition(store, wanted)
    rows = store.rows(
        f"""
        WITH named AS ({NAMED}),
        one AS (
            SELECT {USED_BY[by]} AS name, count(DISTINCT host)::BIGINT AS hosts,
                count(DISTINCT hash(host, boot, netns, cookie, laddr, lport, raddr, rport))
                    FILTER (NOT ({_BEGINS}))::BIGINT AS flows, {_SUMS}
            FROM named WHERE NOT forwarded AND {fits} GROUP BY ALL)
        SELECT *, count(*) OVER () AS total FROM one
        ORDER BY bytes_out + bytes_in DESC LIMIT {int(limit)}
        """,
        words,
    )
    total = rows[0].pop("total") if rows else 0
    for row in rows[1:]:
        del row["total"]
    return total, rows


def new(
    store: FlowStore, wanted: Wanted, what: str, since_ns: int, limit: int
) -> tuple[int, list[dict[str, Any]]]:
    """Return what the range has, but not the whole hours from `since_ns` to the range.

    `what`: of NEW. The names and networks are those of the sums (fleet.collect.rollup).
    """
    fits, words = condition(store, wanted)
    store.open_sums(since_ns)
    columns, of = NEW[what]
    rows = store.rows(
        f"""
        WITH named AS ({NAMED}),
        range AS (
            SELECT host, coalesce(program, comm) AS program,
                {REMOTE} AS remote,
                CASE WHEN client THEN rport ELSE lport END AS service, client, first_ns, raddr
            FROM named LEFT JOIN networks ON raddr = networks.address
            WHERE NOT forwarded AND tgid <> 0 AND {fits}),
        old AS (
            SELECT host, name AS program, remote, service,
                coalesce(initiated, true) AS client
            FROM rollup WHERE hour_ns >= $old AND hour_ns + 3600000000000 <= $since),
        one AS (
            SELECT host, {columns}, min(first_ns) AS first_ns, count(*)::BIGINT AS rows,
                min(raddr) AS raddr
            FROM range WHERE {of} GROUP BY host, {columns})
        SELECT *, count(*) OVER () AS total FROM one ANTI JOIN old USING (host, {columns})
        ORDER BY first_ns LIMIT {int(limit)}
        """,
        words | {"old": since_ns, "since": store.range.since_ns},
    )
    total = rows[0].pop("total") if rows else 0
    for row in rows[1:]:
        del row["total"]
    return total, rows
