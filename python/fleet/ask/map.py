# SPDX-License-Identifier: MIT
"""Which services talk to which: sums of connections by what both ends belong to."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fleet.ask.ends import PROGRAM, join
from fleet.ask.store import FlowStore
from fleet.ask.wanted import Wanted
from fleet.schema import network_of

__all__ = ["NAMES", "service_map"]

NAMES = {
    "process": "NULL",
    "host": "host",
    "unit": "unit",
    "container": "coalesce(container_name, container)",
    "pod": "pod",
    "user": '"user"',
}
"""What the ends of a map may be, and the column; if that is empty, the program, or why none."""

_FAR = "coalesce(alone.domain, networks.network, regexp_replace(raddr, '[.][0-9]+$', '.0/24'))"
_MAP = f"""
WITH one AS (
    SELECT c.name AS client, s.name AS server, s.lport AS service, c.protocol,
        false AS ambiguous, NULL AS reason, c.bytes_out + c.bytes_in AS bytes
    FROM match_ JOIN end_ c ON c.id = match_.c JOIN end_ s ON s.id = match_.s
    WHERE meant AND machines = 1 AND (c.fits OR s.fits)
    UNION ALL
    SELECT CASE WHEN client OR itself THEN name ELSE {_FAR} END,
        CASE WHEN client AND NOT itself THEN {_FAR} ELSE name END,
        CASE WHEN client AND NOT itself THEN rport ELSE lport END, protocol,
        ambiguous, reason, bytes
    FROM alone LEFT JOIN networks ON networks.address = raddr),
sums AS (
    SELECT client, server, service, protocol, count(*)::BIGINT AS connections,
        sum(bytes)::BIGINT AS bytes, ambiguous, reason
    FROM one GROUP BY ALL)
SELECT *, count(*) OVER () AS total FROM sums
ORDER BY bytes DESC, client, server, service, protocol, reason LIMIT {{limit}}
"""


def service_map(
    store: FlowStore, wanted: Wanted, by: str, limit: int = 1 << 40
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many edges there are, and the `limit` with most bytes. `by`: of NAMES.

    {"client", "server": names, "service": port, "protocol", "connections", "bytes", "ambiguous",
    "reason"}. An unknown end is shown as its domain, else as its network, and `reason` says why.
    """
    join(store, wanted, f"coalesce(nullif({NAMES[by]}, ''), {PROGRAM}, '(' || how || ')')")
    rows = store.rows("SELECT DISTINCT raddr FROM alone WHERE contains(raddr, ':')")
    far = [row["raddr"] for row in rows]
    networks = {"address": far, "network": [network_of(one) for one in far]}
    columns = {name: pa.array(values, pa.string()) for name, values in networks.items()}
    store.database.register("networks", pa.table(columns))
    rows = store.rows(_MAP.format(limit=int(limit)))
    total = rows[0]["total"] if rows else 0
    for row in rows:
        del row["total"]
    return total, rows
