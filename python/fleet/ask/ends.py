# SPDX-License-Identifier: MIT
"""Both ends of each connection: the process that asked on one machine, who answered on another.

Two flows are the ends of one connection when one's addresses are the other's, exchanged: those of
the packets, or those that NAT made of them, on either machine or on one in between. The machines'
clocks differ: by how much is learnt for each pair of them from its own connections. Of several
flows that fit, the nearest in time is meant; where more than one machine fits equally, none is
named and the row is flagged.
"""

from __future__ import annotations

from typing import Any

from fleet.ask.hosts import hosts_of
from fleet.ask.store import Store
from fleet.ask.wanted import NAMED, Wanted, condition

__all__ = ["REASONS", "ends"]

REASONS = {
    "outside": "no machine of the fleet has that address",
    "silent": "the machine that has that address told nothing then",
    "lost": "the machine that has that address lost records then",
    "unseen": "the machine that has that address saw no such connection",
    "forwarded": "it passed through a machine to one that is not in the fleet",
    "local": "the other end is on the same machine and was not recorded",
}
"""Why an end has no partner."""

_WIDE_NS = 60 * 10**9
"""How far two clocks may differ."""
_BOUND_NS = 10**9
"""How far two ends' beginnings may, when that is taken off."""
_EDGE_NS = 15 * 10**9
"""A flow that began so near to the range's beginning may be older: its rows are of 10 s."""

# `way`: one of the address pairs that a flow is known by, as its own end sees them. A machine on
# the way that translates is not an end: it adds pairs to those of the ends (`passing`).
_QUERY = f"""
CREATE OR REPLACE TEMP TABLE end_ AS
WITH named AS ({NAMED})
SELECT row_number() OVER () AS id, host, boot, netns, cookie, protocol, laddr, lport, raddr, rport,
    forwarded, tgid, start_ns, any_value(coalesce(program, comm)) AS program,
    any_value("user") AS "user", any_value(unit) AS unit, any_value(container) AS container,
    any_value(container_name) AS container_name, any_value(pod) AS pod,
    any_value(client) AS client, any_value(initiated) AS initiated,
    arg_max(how, last_ns) AS how, bit_or(flags) AS flags,
    max(domain) AS domain, arg_max(nat_laddr, last_ns) AS nat_laddr,
    arg_max(nat_lport, last_ns) AS nat_lport, arg_max(nat_raddr, last_ns) AS nat_raddr,
    arg_max(nat_rport, last_ns) AS nat_rport, min(first_ns) AS first_ns, max(last_ns) AS last_ns,
    sum(packets_out)::BIGINT AS packets_out, sum(bytes_out)::BIGINT AS bytes_out,
    sum(packets_in)::BIGINT AS packets_in, sum(bytes_in)::BIGINT AS bytes_in,
    bool_or({{fits}}) AS fits
FROM named
GROUP BY host, boot, netns, cookie, protocol, laddr, lport, raddr, rport, forwarded, tgid, start_ns;

CREATE OR REPLACE TEMP TABLE way AS
WITH own AS (
    SELECT id, protocol, laddr AS la, lport AS lp, raddr AS ra, rport AS rp FROM end_
        WHERE NOT forwarded
    UNION
    SELECT id, protocol, nat_laddr, nat_lport, nat_raddr, nat_rport FROM end_
        WHERE NOT forwarded AND nat_laddr IS NOT NULL),
passing AS (
    SELECT protocol, laddr AS la, lport AS lp, raddr AS ra, rport AS rp,
        nat_laddr AS na, nat_lport AS np, nat_raddr AS ma, nat_rport AS mp
    FROM end_ WHERE forwarded AND nat_laddr IS NOT NULL),
both_ AS (
    SELECT * FROM passing
    UNION SELECT protocol, ra, rp, la, lp, ma, mp, na, np FROM passing),
back AS (
    SELECT * FROM both_
    UNION SELECT protocol, na, np, ma, mp, la, lp, ra, rp FROM both_
    UNION SELECT protocol, la, lp, ma, mp, na, np, ra, rp FROM both_
    UNION SELECT protocol, na, np, ra, rp, la, lp, ma, mp FROM both_)
SELECT * FROM own
UNION
SELECT own.id, own.protocol, back.na, back.np, back.ma, back.mp
FROM own JOIN back ON own.protocol = back.protocol AND own.la = back.la AND own.lp = back.lp
    AND own.ra = back.ra AND own.rp = back.rp;

CREATE OR REPLACE TEMP TABLE owned AS
SELECT laddr AS address, list(DISTINCT host) AS hosts FROM all_flows WHERE NOT forwarded
GROUP BY laddr;

CREATE OR REPLACE TEMP TABLE pair_ AS
SELECT c.id AS c, s.id AS s, c.host AS ch, s.host AS sh,
    s.first_ns - c.first_ns AS apart,
    c.first_ns < {{edge}} OR s.first_ns < {{edge}} AS old,
    -- an address that several machines have says nothing of which one is meant
    bool_and(c.host <> s.host AND (cw.la IN (SELECT address FROM owned WHERE len(hosts) > 1)
        OR cw.ra IN (SELECT address FROM owned WHERE len(hosts) > 1))) AS doubtful
FROM way cw JOIN way sw ON cw.protocol = sw.protocol AND cw.la = sw.ra AND cw.lp = sw.rp
        AND cw.ra = sw.la AND cw.rp = sw.lp
    JOIN end_ c ON c.id = cw.id JOIN end_ s ON s.id = sw.id
WHERE c.id <> s.id AND c.initiated IS NOT false AND s.initiated IS NOT true
    -- where nobody told who asked: the higher port, of its own ports, not of those that NAT made
    AND (c.initiated OR NOT s.initiated
         OR (c.initiated IS NULL AND s.initiated IS NULL
             AND (c.lport, c.laddr) > (s.lport, s.laddr)))
    AND c.first_ns <= s.last_ns + {_WIDE_NS} AND s.first_ns <= c.last_ns + {_WIDE_NS}
    -- an address of loopback is another one in each namespace
    AND (NOT (starts_with(cw.la, '127.') OR cw.la = '::1' OR starts_with(cw.ra, '127.'))
         OR (c.host = s.host AND c.boot = s.boot AND c.netns = s.netns))
GROUP BY ALL;

CREATE OR REPLACE TEMP TABLE match_ AS
WITH clock AS (
    SELECT ch, sh, CASE WHEN ch = sh THEN 0 ELSE median(apart) END AS ahead
    FROM pair_ WHERE NOT old GROUP BY ch, sh),
timed AS (
    SELECT pair_.*, abs(apart - coalesce(ahead, 0)) AS off
    FROM pair_ LEFT JOIN clock USING (ch, sh)),
near AS (
    SELECT *, min(off) OVER (PARTITION BY c) AS best_c, min(off) OVER (PARTITION BY s) AS best_s,
        bool_or(ch = sh) OVER (PARTITION BY c) AS at_home
    FROM timed WHERE old OR off <= {_BOUND_NS}),
best AS (
    SELECT * FROM near
    -- what a machine talks to on itself has an address that others may have, too
    WHERE (NOT at_home OR ch = sh)
        AND (old OR greatest(off - best_c, off - best_s) <= {_BOUND_NS} // 10))
SELECT c, s, off,
    count(DISTINCT sh) OVER (PARTITION BY c) + CAST(doubtful AS BIGINT) AS machines,
    row_number() OVER (PARTITION BY c ORDER BY off, s) AS place,
    row_number() OVER (PARTITION BY s ORDER BY off, c) AS other_place
FROM best;
"""

_PAIRS = """
SELECT {columns}, m.machines
FROM match_ m JOIN end_ c ON c.id = m.c JOIN end_ s ON s.id = m.s
WHERE m.place = 1 AND m.other_place = 1 AND m.machines = 1 AND (c.fits OR s.fits)
"""
_ALONE = """
SELECT e.*, coalesce(m.machines, 0) AS machines, h.hosts AS others,
    EXISTS (SELECT 1 FROM end_ f WHERE f.forwarded AND f.host <> e.host
        AND f.protocol = e.protocol AND e.lport IN (f.lport, f.rport)
        AND e.rport IN (f.lport, f.rport) AND e.laddr IN (f.laddr, f.raddr)
        AND e.raddr IN (f.laddr, f.raddr)) AS passed
FROM end_ e
    LEFT JOIN (SELECT c AS id, max(machines) AS machines FROM match_ GROUP BY c
               UNION SELECT s, max(machines) FROM match_ GROUP BY s) m ON m.id = e.id
    LEFT JOIN owned h ON h.address = coalesce(e.nat_raddr, e.raddr)
WHERE e.fits AND NOT e.forwarded AND e.id NOT IN (
    SELECT c FROM match_ WHERE place = 1 AND other_place = 1 AND machines = 1
    UNION SELECT s FROM match_ WHERE place = 1 AND other_place = 1 AND machines = 1)
ORDER BY e.last_ns DESC
"""
_SIDE = (
    *("host", "program", "tgid", "start_ns", "user", "unit", "container", "container_name", "pod"),
    *("netns", "laddr", "lport", "raddr", "rport", "how", "flags", "domain"),
    *("first_ns", "last_ns", "packets_out", "bytes_out", "packets_in", "bytes_in"),
)


def ends(store: Store, wanted: Wanted) -> list[dict[str, Any]]:
    """Return connections as {"protocol", "client", "server", "ambiguous", "reason"}.

    Of an end that has no partner the other is None and `reason` says why, one of REASONS.
    """
    fits, words = condition(store, wanted)
    edge = int(store.range.since_ns) + _EDGE_NS
    first, *others = [one for one in _QUERY.format(fits=fits, edge=edge).split(";") if one.strip()]
    store.rows(first, words)
    for statement in others:
        store.rows(statement)
    columns = ", ".join(
        [*(f'{side}."{name}" AS {side}_{name}' for side in "cs" for name in _SIDE), "c.protocol"]
    )
    found = [
        {
            "protocol": row["protocol"],
            "client": {name: row[f"c_{name}"] for name in _SIDE},
            "server": {name: row[f"s_{name}"] for name in _SIDE},
            "ambiguous": False,
            "reason": None,
        }
        for row in store.rows(_PAIRS.format(columns=columns))
    ]
    partial = {one.name: one for one in hosts_of(store) if not one.whole}
    for row in store.rows(_ALONE):
        side = {name: row[name] for name in _SIDE}
        if (row["laddr"], row["lport"]) == (row["raddr"], row["rport"]):  # it talks to itself
            found.append(
                {"protocol": row["protocol"], "client": side, "server": side}
                | {"ambiguous": False, "reason": None}
            )
            continue
        found.append(
            {
                "protocol": row["protocol"],
                "client": side if row["client"] else None,
                "server": None if row["client"] else side,
                "ambiguous": row["machines"] > 1,
                "reason": None if row["machines"] > 1 else _reason(row, partial),
            }
        )
    return found


def _reason(row: dict[str, Any], partial: dict[str, Any]) -> str:
    others: list[str] = row["others"] or []
    if row["host"] in others:
        return "local"
    if not others:
        return "forwarded" if row["passed"] else "outside"
    if len(others) == 1 and others[0] in partial:
        return "silent" if partial[others[0]].silent_s else "lost"
    return "unseen"
