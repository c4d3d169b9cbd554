# SPDX-License-Identifier: MIT
"""One machine's history in the columns of the fleet, so that the same questions need no server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from fleet import schema
from fleet.ask.store import FlowStore, Range, open_tables
from nlproto.client.client import DaemonClient
from nlproto.records.wire import PROTO_NUMBERS, lib

__all__ = ["open_local", "told"]

_MOST = 10_000
"""The most flows that a daemon returns at once; if there are more, the time is divided."""
_SHORT_NS = 10**9
"""A shorter time is not divided any more; then some flows are missing."""
_ALL = 1_000_000
"""The most flows that are kept in memory."""


Ask = Callable[..., dict[str, Any]]
"""Has the signature of DaemonClient.who."""


def open_local(path: str, range: Range) -> FlowStore:
    """Ask the daemon at `path` for the range. Raises Error."""
    with DaemonClient(path) as client:
        flows, processes, whole = told(client.who, range)
    host = os.uname().nodename
    tables = {
        "flows": pa.Table.from_pylist([_flow(one, host) for one in flows], schema.FLOWS),
        "procs": pa.Table.from_pylist([_process(one, host) for one in processes], schema.PROCS),
    }
    store = open_tables(tables, range)
    store.truncated = not whole
    return store


def told(ask: Ask, range: Range) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Return all flows of the range, each once, their processes, and whether they are all."""
    flows: dict[tuple[Any, ...], dict[str, Any]] = {}
    processes: dict[tuple[int, int], dict[str, Any]] = {}
    whole = True
    waiting = [range]
    while waiting:
        part = waiting.pop()  # the latest first
        now = time.time()
        since, until = now - part.since_ns / 1e9, now - part.until_ns / 1e9
        answer = ask(since=since, until=max(until, 1e-3), limit=_MOST)
        for one in answer["flows"]:
            key = tuple(one[name] for name in _KEY)
            if key not in flows or flows[key]["last"] < one["last"]:
                flows[key] = one
        processes |= {(one["tgid"], one["start_ns"]): one for one in answer["processes"]}
        if not answer["truncated"]:
            continue
        if len(flows) >= _ALL or part.until_ns - part.since_ns <= _SHORT_NS:
            whole = False
            continue
        middle = (part.since_ns + part.until_ns) // 2
        waiting += [Range(part.since_ns, middle), Range(middle, part.until_ns)]
    return list(flows.values()), list(processes.values()), whole


_KEY = ("netns", "cookie", "proto", "local", "lport", "remote", "rport", "pid", "start_ns", "first")


def _flow(one: dict[str, Any], host: str) -> dict[str, Any]:
    direct = ("netns", "cookie", "lport", "rport", "forwarded", "uid", "comm", "how")
    sums = ("packets_out", "bytes_out", "packets_in", "bytes_in")
    return {
        **{name: one[name] for name in (*direct, *sums)},
        "host": host,
        "boot": "",
        "sequence": 0,
        "protocol": PROTO_NUMBERS.get(one["proto"], 0),
        "laddr": one["local"],
        "raddr": one["remote"],
        "initiated": None,
        "tgid": one["pid"] or 0,
        "start_ns": one["start_ns"] or 0,
        "flags": lib.SNIFFER_F_AMBIGUOUS if "ambiguous" in one["flags"] else 0,
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
