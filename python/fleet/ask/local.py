# SPDX-License-Identifier: MIT
"""One machine's own history in the columns of the fleet's: without a server the same questions."""

from __future__ import annotations

import os
import time
from typing import Any

import pyarrow as pa

from fleet import schema
from fleet.ask.store import FlowStore, Range, open_tables
from nlproto.client.client import DaemonClient

__all__ = ["open_local"]

_MOST = 10_000
"""Flows that a daemon tells at once."""
_PROTOCOLS = {"tcp": 6, "udp": 17}
_AMBIGUOUS = 1 << 5


def open_local(path: str, range: Range) -> FlowStore:
    """Ask the daemon at `path` for the range. Raises Error."""
    now = time.time()
    since, until = now - range.since_ns / 1e9, now - range.until_ns / 1e9
    with DaemonClient(path) as client:
        answer = client.who(since=since, until=until if until > 0 else None, limit=_MOST)
    host = os.uname().nodename
    flows = [_flow(one, host) for one in answer["flows"]]
    procs = [_process(one, host) for one in answer["processes"]]
    tables = {
        "flows": pa.Table.from_pylist(flows, schema.FLOWS),
        "procs": pa.Table.from_pylist(procs, schema.PROCS),
    }
    store = open_tables(tables, range)
    store.truncated = bool(answer["truncated"])
    return store


def _flow(one: dict[str, Any], host: str) -> dict[str, Any]:
    direct = ("netns", "cookie", "lport", "rport", "forwarded", "uid", "comm", "how")
    sums = ("packets_out", "bytes_out", "packets_in", "bytes_in")
    return {
        **{name: one[name] for name in (*direct, *sums)},
        "host": host,
        "boot": "",
        "sequence": 0,
        "protocol": _PROTOCOLS.get(one["proto"], 0),
        "laddr": one["local"],
        "raddr": one["remote"],
        "initiated": None,
        "tgid": one["pid"] or 0,
        "start_ns": one["start_ns"] or 0,
        "flags": _AMBIGUOUS if "ambiguous" in one["flags"] else 0,
        "first_ns": int(one["first"] * 1e9),
        "last_ns": int(one["last"] * 1e9),
        "nat_laddr": one.get("nat_local") or None,
        "nat_raddr": one.get("nat_remote") or None,
        "nat_lport": one.get("nat_lport") or None,
        "nat_rport": one.get("nat_rport") or None,
        "domain": one.get("domain") or None,
    }


def _process(one: dict[str, Any], host: str) -> dict[str, Any]:
    texts = ("comm", "exe", "cmdline", "unit", "container", "container_name", "image", "pod")
    return {
        **{name: one.get(name) or None for name in texts},
        "host": host,
        "boot": "",
        "sequence": 0,
        "tgid": one["tgid"],
        "start_ns": one["start_ns"],
        "at_ns": time.time_ns(),
        "name": os.path.basename(one.get("exe") or "") or one["comm"],
        "ppid": one.get("ppid"),
        "parents": [],
        "uid": one["uid"],
        "user": str(one["uid"]),
        "namespace": one.get("namespace") or None,
        "sha256": one.get("sha256") or None,
    }
