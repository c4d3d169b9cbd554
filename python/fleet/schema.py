# SPDX-License-Identifier: MIT
"""The columns of the fleet's three tables, and where their hours are on disk.

    DIR/flows/hour=2026-11-27T00/part-*.parquet      the hour (UTC) of a row's `last_ns`
    DIR/procs/hour=2026-11-27T00/part-*.parquet      of its `at_ns`
    DIR/account/hour=2026-11-27T00/part-*.parquet    of its `at_ns`
    DIR/rollup/hour=2026-11-27T00/part-0.parquet     sums of that hour's flows, kept for longer
    DIR/rollup/day=2026-11-27/part-0.parquet         sums of that day's hours, which stay

(host, boot, sequence) identifies one batch of one host. A batch that is there twice was sent twice.
Files whose names begin with a dot are being written.
"""

from __future__ import annotations

import ipaddress
import re
import time
from datetime import datetime
from pathlib import Path

import pyarrow as pa

__all__ = [
    "ACCOUNT",
    "ACCOUNT_EVERY_S",
    "DAY_NS",
    "FLOWS",
    "HOUR_NS",
    "PROCS",
    "ROLLUP",
    "TABLES",
    "day_name",
    "day_ns",
    "hour_name",
    "hour_ns",
    "hours_of_day",
    "is_hour",
    "network_of",
]

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS
ACCOUNT_EVERY_S = 60.0
"""A host sends its account this often, and once when its exporter ends."""
_FORM = "hour=%Y-%m-%dT%H"
_HOUR = re.compile("hour=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}")

_WORD = pa.dictionary(pa.int32(), pa.string())
"""A string that many rows have."""
_BATCH = [("host", _WORD), ("boot", _WORD), ("sequence", pa.uint64())]

FLOWS = pa.schema(
    [
        *_BATCH,
        ("netns", pa.uint32()),
        ("cookie", pa.uint64()),
        ("protocol", pa.uint8()),
        ("laddr", _WORD),
        ("lport", pa.uint16()),
        ("raddr", _WORD),
        ("rport", pa.uint16()),
        ("forwarded", pa.bool_()),
        ("initiated", pa.bool_()),
        ("tgid", pa.uint32()),
        ("start_ns", pa.uint64()),
        ("uid", pa.uint32()),
        ("comm", _WORD),
        ("how", _WORD),
        ("flags", pa.uint32()),
        ("first_ns", pa.int64()),
        ("last_ns", pa.int64()),
        ("packets_out", pa.uint64()),
        ("bytes_out", pa.uint64()),
        ("packets_in", pa.uint64()),
        ("bytes_in", pa.uint64()),
        ("nat_laddr", _WORD),
        ("nat_raddr", _WORD),
        ("nat_lport", pa.uint16()),
        ("nat_rport", pa.uint16()),
        ("domain", _WORD),
    ]
)
"""What one flow of one owner did since its last row: at most ten seconds.

tgid 0: unnamed, then `uid` is null and `how` is the reason. `forwarded`: neither end is a process
here. `initiated`: this end began the connection; null if unknown. Times are ns since 1970.
"""

PROCS = pa.schema(
    [
        *_BATCH,
        ("tgid", pa.uint32()),
        ("start_ns", pa.uint64()),
        ("at_ns", pa.int64()),
        ("comm", _WORD),
        ("name", _WORD),
        ("exe", _WORD),
        ("cmdline", pa.string()),
        ("ppid", pa.uint32()),
        ("parents", pa.list_(pa.string())),
        ("uid", pa.uint32()),
        ("user", _WORD),
        ("unit", _WORD),
        ("container", _WORD),
        ("container_name", _WORD),
        ("image", _WORD),
        ("pod", _WORD),
        ("namespace", _WORD),
        ("sha256", _WORD),
    ]
)
"""A process by (host, boot, tgid, start_ns). It is sent again after a change, and once in each hour
in which it has flows. The newest row counts.

`parents`: "pid comm", the nearest first. `name`: the file name of `exe`, else `comm`. `namespace`
is the pod's. Null means unknown.
"""

ACCOUNT = pa.schema(
    [
        *_BATCH,
        ("at_ns", pa.int64()),
        ("exported", pa.uint64()),
        ("acknowledged", pa.uint64()),
        ("spooled", pa.uint64()),
        ("lost", pa.uint64()),
        ("received", pa.uint64()),
        ("dropped", pa.uint64()),
        ("delivered", pa.uint64()),
        ("daemon_lost", pa.uint64()),
        ("gap_ms", pa.uint64()),
        ("version", _WORD),
        ("engine", _WORD),
    ]
)
"""One host's account at `at_ns`, each minute while it lives and at its end.

In rows of FLOWS, since the spool began: exported = acknowledged + spooled + lost. `received` and
`dropped`: what this exporter's subscription received, and lost by being too slow. `delivered` and
`daemon_lost` are the daemon's own account, in records since it began. `gap_ms`: how long the
exporter had no daemon since the spool began.
"""

ROLLUP = pa.schema(
    [
        ("hour_ns", pa.int64()),
        ("host", _WORD),
        ("name", _WORD),
        ("unit", _WORD),
        ("container_name", _WORD),
        ("remote", _WORD),
        ("protocol", pa.uint8()),
        ("service", pa.uint16()),
        ("initiated", pa.bool_()),
        ("flows", pa.uint64()),
        ("packets_out", pa.uint64()),
        ("bytes_out", pa.uint64()),
        ("packets_in", pa.uint64()),
        ("bytes_in", pa.uint64()),
    ]
)
"""`remote`: the far end's domain, else its network (/24, /64). `service`: the port that serves.
`hour_ns`: when the hour begins, or the day."""

TABLES = {"flows": FLOWS, "procs": PROCS, "account": ACCOUNT}


def hour_name(ns: int) -> str:
    """Return the folder's name for a moment in ns since 1970: "hour=2026-11-27T00"."""
    return time.strftime(_FORM, time.gmtime(ns // 10**9))


def hour_ns(name: str) -> int:
    """Return when a folder's hour begins, in ns since 1970. Raises ValueError for another name."""
    if _HOUR.fullmatch(name) is None:
        raise ValueError(f"'{name}' is no hour")
    return int(datetime.fromisoformat(f"{name[5:]}:00+00:00").timestamp()) * 10**9


def is_hour(name: str) -> bool:
    """Return whether that is the name of an hour's folder."""
    try:
        return hour_ns(name) >= 0
    except ValueError:
        return False


def day_name(ns: int) -> str:
    """Return the folder's name for the day of a moment in ns since 1970: "day=2026-11-27"."""
    return hour_name(ns).replace("hour=", "day=").partition("T")[0]


def day_ns(name: str) -> int:
    """Return when a folder's day begins, in ns since 1970. Raises ValueError for another name."""
    kind, _, text = name.partition("=")
    if kind != "day":
        raise ValueError(f"'{name}' is no day")
    return hour_ns(f"hour={text}T00")


def hours_of_day(folder: Path, name: str) -> list[Path]:
    """Return the folders that the hours of the day `name` have in `folder`. Raises ValueError."""
    begin = day_ns(name)
    return [folder / hour_name(begin + at * HOUR_NS) for at in range(24)]


def network_of(address: str) -> str:
    """Return the network of an address: its /24, or its /64. Other text stays as it is."""
    length = 64 if ":" in address else 24
    try:
        return str(ipaddress.ip_network((address, length), strict=False))
    except ValueError:  # from a hostile machine may come any text
        return address
