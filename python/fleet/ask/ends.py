# SPDX-License-Identifier: MIT
"""Joins both ends of each connection: the client's process on one machine, the server's on another.

Two flows are the ends of one connection if the addresses of one are those of the other, exchanged.
They may be the packets' addresses, or those after NAT on either machine or in between. Clocks of
machines differ; the difference of each pair is learnt from its own connections. Of several flows
that fit, the nearest in time counts. If several machines fit equally, none is named, and the row is
flagged.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fleet.ask.hosts import hosts_of
from fleet.ask.store import FlowStore
from fleet.ask.wanted import NAMED, Wanted, condition

__all__ = ["REASONS", "ends", "join"]

REASONS = {
    "outside": "no machine of the fleet has that address",
    "silent": "the machine with that address sent nothing then",
    "lost": "the machine with that address lost records then",
    "unseen": "the machine with that address saw no such connection",
    "forwarded": "it passed through a machine to one that is not in the fleet",
    "local": "the other end is on the same machine and was not recorded",
}
"""Why an end has no partner."""

_WIDE_NS = 60 * 10**9
"""The most that two clocks may differ."""
_BOUND_NS = 10**9
"""The most that the beginnings of two ends may differ, after that correction."""
_EDGE_NS = 15 * 10**9
"""A flow that began so near to the range's beginning may be older: its rows cover 10 s."""
_VOTES = 3
"""How many connections it takes to learn a difference of clocks."""
_STEPS = 3
"""How many machines in a row may translate."""

# Tuples are compared by hash first: `key` as its own end sees it, `mirror` as the other end does.
_KEY = "hash(protocol, laddr, lport, raddr, rport)"
_MIRROR = "hash(protocol, raddr, rport, laddr, lport)"
_NAT_KEY = "hash(protocol, nat_laddr, nat_lport, nat_raddr, nat_rport)"
_NAT_MIRROR = "hash(protocol, nat_raddr, nat_rport, nat_laddr, nat_lport)"

# Which flows can belong to the flows that fit: all of the same tuple, from either side, and their
# translations by machines on the way.
_TOUCHED = f"""
CREATE OR REPLACE TEMP TABLE touched AS
WITH hit AS (
    SELECT DISTINCT protocol, laddr, lport, raddr, rport, nat_laddr, nat_lport, nat_raddr, nat_rport
    FROM ({NAMED}) WHERE {{fits}})
SELECT {_KEY} AS key FROM hit UNION SELECT {_MIRROR} FROM hit
UNION SELECT {_NAT_KEY} FROM hit WHERE nat_laddr IS NOT NULL
UNION SELECT {_NAT_MIRROR} FROM hit WHERE nat_laddr IS NOT NULL
"""
_SHARED = "(c.la IN (SELECT address FROM shared) OR c.ra IN (SELECT address FROM shared))"
_TRANSLATED = f"""
CREATE OR REPLACE TEMP TABLE translated AS
SELECT DISTINCT {_KEY} AS key, {_MIRROR} AS mirror, {_NAT_KEY} AS nat_key,
    {_NAT_MIRROR} AS nat_mirror,
    hash(protocol, laddr, lport, nat_raddr, nat_rport) AS near_key,
    hash(protocol, nat_raddr, nat_rport, laddr, lport) AS near_mirror,
    hash(protocol, nat_laddr, nat_lport, raddr, rport) AS far_key,
    hash(protocol, raddr, rport, nat_laddr, nat_lport) AS far_mirror
FROM flow WHERE nat_laddr IS NOT NULL
"""
_ALL_KEYS = (
    *("key", "mirror", "nat_key", "nat_mirror", "near_key", "near_mirror"),
    *("far_key", "far_mirror"),
)
_TOUCH_MORE = f"""
INSERT INTO touched
SELECT DISTINCT unnest([{", ".join(_ALL_KEYS)}]) AS new FROM translated
WHERE {" OR ".join(f"{key} IN (SELECT key FROM touched)" for key in _ALL_KEYS)}
EXCEPT SELECT key FROM touched
"""
_IS_TOUCHED = f"""
WHERE {_KEY} IN (SELECT key FROM touched)
    OR nat_laddr IS NOT NULL AND {_NAT_KEY} IN (SELECT key FROM touched)
"""

# The first packets of a TCP connection came to the listener's socket or left without one. So they
# are flows of their own. They belong to who accepted it.
_EARLY = """protocol = 6 AND NOT forwarded
    AND (how IN ('listener', 'predates') OR tgid <> 0 AND cookie = 0)"""
# One row for each flow of a host. Most flows have one row in a range, and only the others are put
# together. What a host may make alike by a clever choice of its numbers is its own.
_ENDS = f"""
CREATE OR REPLACE TEMP TABLE end_row AS
SELECT host, hash(boot, netns, cookie, protocol, laddr, lport, raddr, rport, forwarded, tgid,
        start_ns) AS flow, hash(boot, netns) AS place,
    protocol, laddr, lport, raddr, rport, forwarded, {{name}} AS name, initiated, client,
    {{translation}}, domain, {{details}} first_ns, last_ns,
    bytes_out::BIGINT AS bytes_out, bytes_in::BIGINT AS bytes_in, {{fits}} AS fits,
    {_EARLY} AS early, tgid <> 0 AS owned, cookie,
    how IN ('listener', 'predates') AS listening, {_KEY} AS key, {_MIRROR} AS mirror
FROM ({NAMED}) {{touched}}
"""
_ACCEPTED = """
UPDATE end_row SET flow = later.flow, name = later.name, early = later.early{owner}
FROM (
    SELECT e.host, e.flow AS early_flow, {chosen}
    FROM end_row e JOIN end_row s ON s.host = e.host AND s.place = e.place AND s.key = e.key
    WHERE e.early AND s.owned AND NOT s.forwarded AND e.flow <> s.flow AND {which}
    GROUP BY e.host, e.flow) later
WHERE end_row.early AND end_row.host = later.host AND end_row.flow = later.early_flow
"""
_WHICH = (
    # of its own socket; then the next one; else the last of those that nobody accepted
    ("NOT s.early AND s.cookie = e.cookie AND e.cookie <> 0", "s.first_ns"),
    (
        f"NOT s.early AND s.first_ns BETWEEN e.first_ns AND e.last_ns + {_EDGE_NS}",
        "s.first_ns",
    ),
    (
        f"e.listening AND s.early AND s.first_ns BETWEEN e.first_ns + 1 AND e.last_ns + {_EDGE_NS}",
        "-s.first_ns",
    ),
)
"""Which row takes an early one, and by what it is the first."""
_REPEATED = """
CREATE OR REPLACE TEMP TABLE repeated AS SELECT flow FROM end_row GROUP BY flow HAVING count(*) > 1
"""
_SUMMED = """
CREATE OR REPLACE TEMP TABLE summed AS
SELECT host, flow, {same}, any_value(initiated) AS initiated,
    coalesce(any_value(initiated), any_value(client)) AS client,
    {translation}, max(domain) AS domain, {details}
    min(first_ns) AS first_ns, max(last_ns) AS last_ns,
    sum(bytes_out)::BIGINT AS bytes_out, sum(bytes_in)::BIGINT AS bytes_in, bool_or(fits) AS fits
FROM end_row WHERE flow IN (FROM repeated)
GROUP BY host, flow
"""
_SAME = (
    *("place", "protocol", "laddr", "lport", "raddr", "rport", "forwarded", "name", "key"),
    "mirror",
)
_PUT_TOGETHER = (
    "DELETE FROM end_row WHERE flow IN (FROM repeated)",
    "INSERT INTO end_row BY NAME FROM summed",
)
_NUMBERED = "CREATE OR REPLACE TEMP VIEW end_ AS SELECT rowid AS id, * FROM end_row"
_OWNER = ("boot", "netns", "tgid", "start_ns")
_OWN = (*_OWNER, "how", "flags")
_DETAILS = (*_OWN, "packets_out", "packets_in")
_SUMMED_DETAILS = """
    arg_max(how, last_ns) AS how, bit_or(flags) AS flags,
    sum(packets_out) AS packets_out, sum(packets_in) AS packets_in,
"""
_NAT = {"nat_laddr": "VARCHAR", "nat_lport": "USMALLINT", "nat_raddr": "VARCHAR",
        "nat_rport": "USMALLINT"}  # fmt: skip

# `way`: an address pair of a flow, as its own end sees it. A machine on the way that translates is
# no end: it adds pairs to those of the ends (`passing`).
_PASSING = """
CREATE OR REPLACE TEMP TABLE back AS
WITH passing AS (
    SELECT host, first_ns, last_ns, protocol, laddr AS la, lport AS lp, raddr AS ra, rport AS rp,
        nat_laddr AS na, nat_lport AS np, nat_raddr AS ma, nat_rport AS mp
    FROM end_ WHERE forwarded AND nat_laddr IS NOT NULL),
both_ AS (
    SELECT * FROM passing
    UNION SELECT host, first_ns, last_ns, protocol, ra, rp, la, lp, ma, mp, na, np FROM passing)
SELECT * FROM both_
UNION SELECT host, first_ns, last_ns, protocol, na, np, ma, mp, la, lp, ra, rp FROM both_
UNION SELECT host, first_ns, last_ns, protocol, la, lp, ma, mp, na, np, ra, rp FROM both_
UNION SELECT host, first_ns, last_ns, protocol, na, np, ra, rp, la, lp, ma, mp FROM both_
"""
_WAYS = """
CREATE OR REPLACE TEMP TABLE way AS
SELECT id, protocol, nat_laddr AS la, nat_lport AS lp, nat_raddr AS ra, nat_rport AS rp,
    false AS vague
FROM end_ WHERE NOT forwarded AND nat_laddr IS NOT NULL
"""
# `vague`: two machines have such a flow, or two translate one, so that it is not certain. For its
# own containers a machine knows what it translates.
_MORE_WAYS = f"""
INSERT INTO way
WITH known AS (
    SELECT id, protocol, laddr AS la, lport AS lp, raddr AS ra, rport AS rp, false AS vague
    FROM end_ WHERE NOT forwarded
    UNION SELECT * FROM way),
found AS (
    SELECT known.*, back.na, back.np, back.ma, back.mp, end_.host, back.host AS by_host
    FROM known JOIN end_ USING (id) JOIN back ON known.protocol = back.protocol
        AND known.la = back.la AND known.lp = back.lp AND known.ra = back.ra AND known.rp = back.rp
        AND end_.first_ns <= back.last_ns + {_WIDE_NS}
        AND back.first_ns <= end_.last_ns + {_WIDE_NS}
    WHERE (id, back.na, back.np, back.ma, back.mp) NOT IN (SELECT (id, la, lp, ra, rp) FROM known)),
counted AS (
    SELECT *, bool_or(host = by_host) OVER (PARTITION BY id, la, lp, ra, rp) AS at_home,
        count(DISTINCT by_host) OVER (PARTITION BY id, la, lp, ra, rp) AS translating,
        count(DISTINCT host) OVER (PARTITION BY by_host, protocol, la, lp, ra, rp) AS having_it
    FROM found)
SELECT id, protocol, na, np, ma, mp,
    bool_and(vague OR host <> by_host AND (translating > 1 OR having_it > 1)) AS vague
FROM counted WHERE NOT at_home OR host = by_host
GROUP BY id, protocol, na, np, ma, mp
"""

_OWN_WAY = "laddr AS la, lport AS lp, raddr AS ra, rport AS rp, false AS vague, end_.*"
_KNOWN = f"SELECT {_OWN_WAY} FROM end_ WHERE NOT forwarded"
_ALL_KNOWN = f"""
{_KNOWN} UNION ALL
SELECT la, lp, ra, rp, vague, end_.* REPLACE (
    hash(end_.protocol, la, lp, ra, rp) AS key, hash(end_.protocol, ra, rp, la, lp) AS mirror)
FROM way JOIN end_ USING (id)
"""
_PAIRS = f"""
CREATE OR REPLACE TEMP TABLE pair_ AS
WITH known AS ({{known}})
SELECT c.id AS c, s.id AS s, c.host AS ch, s.host AS sh, s.first_ns - c.first_ns AS apart,
    c.first_ns < {{edge}} OR s.first_ns < {{edge}} AS old,
    -- an address that several machines have says nothing of which one is meant
    c.host <> s.host AND (c.vague OR s.vague OR {{shared}}) AS doubtful
FROM (SELECT * FROM known WHERE initiated IS NOT false) c
    JOIN (SELECT * FROM known WHERE initiated IS NOT true) s ON c.key = s.mirror
WHERE c.protocol = s.protocol AND c.la = s.ra AND c.lp = s.rp AND c.ra = s.la AND c.rp = s.lp
    AND c.id <> s.id
    -- where nobody told who asked: the higher port, of its own ports, not of those that NAT made
    AND (c.initiated OR NOT s.initiated
         OR (c.initiated IS NULL AND s.initiated IS NULL
             AND (c.lport, c.laddr) > (s.lport, s.laddr)))
    AND c.first_ns <= s.last_ns + {_WIDE_NS} AND s.first_ns <= c.last_ns + {_WIDE_NS}
    -- an address of loopback is another one in each namespace
    AND (NOT (starts_with(c.la, '127.') OR c.la = '::1' OR starts_with(c.ra, '127.'))
         OR (c.host = s.host AND c.place = s.place))
"""
_PAIRS_ONCE = """
CREATE OR REPLACE TEMP TABLE pair_ AS
SELECT c, s, ch, sh, apart, old, bool_and(doubtful) AS doubtful FROM pair_ GROUP BY ALL
"""
# Between two machines the difference of clocks is the median of their connections, if there are
# three. With fewer, it is the difference of each machine to all others, if there are three. Else
# there is none.
_NEAR = f"""
CREATE OR REPLACE TEMP TABLE near AS
WITH told AS (SELECT * FROM pair_ WHERE NOT old AND ch <> sh),
often AS (SELECT ch, sh FROM told GROUP BY ch, sh HAVING count(*) >= {_VOTES}),
pairs AS (
    SELECT ch, sh, median(apart) AS ahead FROM told SEMI JOIN often USING (ch, sh)
    GROUP BY ch, sh),
each AS (
    SELECT host, median(apart) AS ahead
    FROM (SELECT sh AS host, apart FROM told UNION ALL SELECT ch, -apart FROM told)
    GROUP BY host HAVING count(*) >= {_VOTES}),
timed AS (
    SELECT pair_.*, abs(apart - CASE WHEN pair_.ch = pair_.sh THEN 0
        ELSE coalesce(pairs.ahead, coalesce(s.ahead, 0) - coalesce(c.ahead, 0)) END) AS off
    FROM pair_ LEFT JOIN pairs USING (ch, sh) LEFT JOIN each c ON c.host = ch
        LEFT JOIN each s ON s.host = sh)
SELECT * FROM timed WHERE off <= CASE WHEN old THEN {_EDGE_NS} ELSE {_BOUND_NS} END
"""
_MATCHES = f"""
CREATE OR REPLACE TEMP TABLE match_ AS
WITH twice AS (
    SELECT c FROM near GROUP BY c HAVING count(*) > 1),
thrice AS (
    SELECT s FROM near GROUP BY s HAVING count(*) > 1),
alone AS (
    SELECT * FROM near WHERE c NOT IN (FROM twice) AND s NOT IN (FROM thrice)),
several AS (
    SELECT *, min(off) OVER (PARTITION BY c) AS best_c, min(off) OVER (PARTITION BY s) AS best_s,
        bool_or(ch = sh) OVER (PARTITION BY c) AS at_home
    FROM near WHERE c IN (FROM twice) OR s IN (FROM thrice)),
best AS (
    SELECT * FROM several
    -- what a machine talks to on itself has an address that others may have, too
    WHERE (NOT at_home OR ch = sh)
        AND (old OR greatest(off - best_c, off - best_s) <= {_BOUND_NS} // 10))
SELECT c, s, 1 + CAST(doubtful AS BIGINT) AS machines, true AS meant FROM alone
UNION ALL
SELECT c, s, count(DISTINCT sh) OVER (PARTITION BY c) + CAST(doubtful AS BIGINT) AS machines,
    row_number() OVER (PARTITION BY c ORDER BY off, s) = 1
        AND row_number() OVER (PARTITION BY s ORDER BY off, c) = 1 AS meant
FROM best
"""

# Why an end has no partner.
_ALONE = """
CREATE OR REPLACE TEMP TABLE alone AS
WITH paired AS (
    SELECT unnest([c, s]) AS id FROM match_ WHERE meant AND machines = 1),
rest AS (
    SELECT id, host, protocol, laddr, lport, raddr, rport, client, name, domain, last_ns,
        bytes_out + bytes_in AS bytes, coalesce(nat_raddr, raddr) AS other,
        laddr = raddr AND lport = rport AS itself
    FROM end_ ANTI JOIN paired USING (id)
    WHERE fits AND NOT forwarded),
passed AS (
    SELECT DISTINCT rest.id FROM rest JOIN end_ f ON {any} AND f.forwarded
        AND f.host <> rest.host AND f.protocol = rest.protocol
        AND least((f.laddr, f.lport), (f.raddr, f.rport))
            = least((rest.laddr, rest.lport), (rest.raddr, rest.rport))
        AND greatest((f.laddr, f.lport), (f.raddr, f.rport))
            = greatest((rest.laddr, rest.lport), (rest.raddr, rest.rport))),
seen AS (
    SELECT id, max(machines) AS machines FROM (
        SELECT c AS id, machines FROM match_ UNION ALL SELECT s, machines FROM match_)
    WHERE machines > 1 GROUP BY id)
SELECT rest.*, coalesce(machines, 0) > 1 AND NOT itself AS ambiguous,
    CASE WHEN itself OR machines > 1 THEN NULL
        WHEN list_contains(owned.hosts, rest.host) THEN 'local'
        WHEN owned.hosts IS NULL
            THEN CASE WHEN passed.id IS NULL THEN 'outside' ELSE 'forwarded' END
        WHEN len(owned.hosts) = 1 AND partial.why IS NOT NULL THEN partial.why
        ELSE 'unseen' END AS reason
FROM rest LEFT JOIN seen USING (id) LEFT JOIN passed USING (id)
    LEFT JOIN owned ON owned.address = other
    LEFT JOIN partial ON partial.host = owned.hosts[1]
"""

_SIDE = (
    *("host", "program", "tgid", "start_ns", "user", "unit", "container", "container_name", "pod"),
    *("netns", "laddr", "lport", "raddr", "rport", "how", "flags", "domain"),
    *("first_ns", "last_ns", "packets_out", "bytes_out", "packets_in", "bytes_in"),
)
_FOUND = """
WITH both_ AS (
    SELECT c, s, false AS ambiguous, NULL AS reason, e.last_ns, e.protocol
    FROM match_ JOIN end_ e ON e.id = c JOIN end_ t ON t.id = s
    WHERE meant AND machines = 1 AND (e.fits OR t.fits)
    UNION ALL
    SELECT CASE WHEN client OR itself THEN id END, CASE WHEN NOT client OR itself THEN id END,
        ambiguous, reason, last_ns, protocol FROM alone),
shown AS (
    SELECT *, count(*) OVER () AS total FROM both_
    ORDER BY c IS NULL OR s IS NULL, last_ns DESC LIMIT {limit}),
detail AS (
    SELECT end_.* RENAME (name AS program), p.user, p.unit, p.container,
        p.container_name, p.pod
    FROM end_ LEFT JOIN proc p USING (host, boot, tgid, start_ns)
    WHERE id IN (SELECT c FROM shown UNION ALL SELECT s FROM shown))
SELECT {columns}, shown.* FROM shown LEFT JOIN detail c ON c.id = shown.c
    LEFT JOIN detail s ON s.id = shown.s
ORDER BY shown.c IS NULL OR shown.s IS NULL, shown.last_ns DESC
"""
PROGRAM = "coalesce(program, nullif(comm, ''))"


def join(store: FlowStore, wanted: Wanted, name: str, details: bool = False) -> None:
    """Make the tables `end_`, `match_` and `alone` of the connections that fit.

    `name`: an expression over NAMED; each end has it as `name`. Raises Error.
    """
    fits, words = condition(store, wanted)
    translated = bool(store.rows("SELECT 1 FROM flow WHERE nat_laddr IS NOT NULL LIMIT 1"))
    touched = ""
    if fits != "true":
        touched = _IS_TOUCHED
        store.rows(_TOUCHED.format(fits=fits), words)
        if translated:
            store.rows(_TRANSLATED)
            _until_all(store, _TOUCH_MORE)
    store.rows(
        _ENDS.format(
            touched=touched,
            name=name,
            fits=fits,
            translation=_nat("{column}") if translated else _nat("NULL::{kind}"),
            details="".join(f"{one}, " for one in _DETAILS if details),
        ),
        words,
    )
    if store.rows("SELECT 1 FROM end_row WHERE early LIMIT 1"):
        own = ("flow", "name", "early", *(_OWN if details else ()))
        for which, order in _WHICH:
            chosen = ", ".join(f"arg_min(s.{one}, {order}) AS {one}" for one in own)
            owner = "".join(f", {one} = later.{one}" for one in own[3:])
            store.rows(_ACCEPTED.format(owner=owner, chosen=chosen, which=which))
    store.rows(_REPEATED)
    if store.rows("SELECT 1 FROM repeated LIMIT 1"):
        same = [*_SAME, *(_OWNER if details else ())]
        store.rows(
            _SUMMED.format(
                same=", ".join(f"any_value({one}) AS {one}" for one in same),
                translation=_nat("arg_max({column}, last_ns)"),
                details=_SUMMED_DETAILS if details else "",
            )
        )
        for statement in _PUT_TOGETHER:
            store.rows(statement)
    store.rows(_NUMBERED)
    if translated:
        store.rows(_WAYS)
        store.rows(_PASSING)
        if store.rows("SELECT 1 FROM back LIMIT 1"):
            _until_all(store, _MORE_WAYS)
    shared = "false" if not _tell_hosts(store) else _SHARED
    edge = int(store.range.since_ns) + _EDGE_NS
    known = _ALL_KNOWN if translated else _KNOWN
    store.rows(_PAIRS.format(known=known, edge=edge, shared=shared))
    if translated:
        store.rows(_PAIRS_ONCE)
    store.rows(_NEAR)
    store.rows(_MATCHES)
    passing = bool(store.rows("SELECT 1 FROM end_ WHERE forwarded LIMIT 1"))
    store.rows(_ALONE.format(any="true" if passing else "false"))


def _nat(value: str) -> str:
    """Each of NAT's columns as `value` of it."""
    return ", ".join(
        f"{value.format(column=column, kind=kind)} AS {column}" for column, kind in _NAT.items()
    )


def _until_all(store: FlowStore, insert: str) -> None:
    for _ in range(_STEPS):
        if not store.rows(insert)[0]["Count"]:
            break


def _tell_hosts(store: FlowStore) -> bool:
    """Make the tables `owned`, `shared` and `partial`; return whether machines share an address."""
    partial = {one.name: "silent" if one.silent_s else "lost" for one in hosts_of(store)
               if not one.whole}  # fmt: skip
    owners = store.owners
    shared = [address for address, hosts in owners.items() if len(hosts) > 1]
    text = pa.string()
    tables = {
        "owned": {
            "address": pa.array(list(owners), text),
            "hosts": pa.array(list(owners.values()), pa.list_(text)),
        },
        "shared": {"address": pa.array(shared, text)},
        "partial": {
            "host": pa.array(list(partial), text),
            "why": pa.array(list(partial.values()), text),
        },
    }
    for name, columns in tables.items():
        store.database.register(name, pa.table(columns))
    return bool(shared)


def ends(
    store: FlowStore, wanted: Wanted, limit: int = 1 << 40
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many connections fit, and `limit` of them, both ends first, the latest first.

    {"protocol", "client", "server", "ambiguous", "reason"}. An end without a partner has None for
    the other end, and `reason` is one of REASONS.
    """
    join(store, wanted, PROGRAM, True)
    columns = ", ".join(f'{side}."{name}" AS {side}_{name}' for side in "cs" for name in _SIDE)
    found = store.rows(_FOUND.format(columns=columns, limit=int(limit)))
    rows = [
        {
            "protocol": row["protocol"],
            "client": _side(row, "c"),
            "server": _side(row, "s"),
            "ambiguous": row["ambiguous"],
            "reason": row["reason"],
        }
        for row in found
    ]
    return (found[0]["total"] if found else 0), rows


def _side(row: dict[str, Any], side: str) -> dict[str, Any] | None:
    if row[side] is None:
        return None
    return {name: row[f"{side}_{name}"] for name in _SIDE}
