# SPDX-License-Identifier: MIT
"""One machine's history in the columns of the fleet, so that the same questions need no server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from fleet import schema
from fleet.ask.store import FlowStore, Range, open_tables
from fleet.ask.wanted import Wanted
from nlproto.client.client import DaemonClient
from nlproto.filters.nodes import Chain, Equal, Node, Ports
from nlproto.records.wire import PROTO_NAMES, PROTO_NUMBERS, lib

__all__ = ["narrowed", "open_local", "tell"]

_MOST = 4000
"""Flows on a page, so that most answers have room for their processes."""
_ROUNDED = 1e-6
"""The most by which a time in an answer differs from the flow's."""
_LATE = 10.0
"""s that a question may wait for the daemon, whose own clock counts from then on."""
_ALL = 1_000_000
"""The most flows that are kept in memory."""


Ask = Callable[..., dict[str, Any]]
"""Has the signature of DaemonClient.who."""
Keep = Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]
"""Takes flows and processes."""


def open_local(
    path: str, range: Range, wanted: Wanted | None = None, earlier_ns: int | None = None
) -> FlowStore:
    """Ask the daemon at `path` for the range. Raises Error.

    `wanted`: only these flows are needed, others may be missing; `earlier_ns`: since when flows
    from before the range are needed too.
    """
    host = os.uname().nodename
    tables: dict[str, list[pa.Table]] = {
        "flows": [schema.FLOWS.empty_table()],
        "procs": [schema.PROCS.empty_table()],
    }

    def keep(flows: list[dict[str, Any]], processes: list[dict[str, Any]]) -> None:
        rows = [_flow(one, host) for one in flows]
        tables["flows"].append(pa.Table.from_pylist(rows, schema.FLOWS))
        rows = [_process(one, host) for one in processes]
        tables["procs"].append(pa.Table.from_pylist(rows, schema.PROCS))

    with DaemonClient(path) as client:
        since_ns = range.since_ns if earlier_ns is None else earlier_ns
        ask = partial(client.who, **({} if wanted is None else narrowed(wanted)))
        whole = tell(ask, Range(since_ns, range.until_ns), keep)
    joined = {kind: pa.concat_tables(parts) for kind, parts in tables.items()}
    store = open_tables(joined, range)
    store.truncated = not whole
    return store


def narrowed(wanted: Wanted) -> dict[str, Any]:
    """Return conditions of DaemonClient.who that all flows fit which are `wanted`."""
    found: dict[str, Any] = {}
    if wanted.host is not None:
        found["host"] = wanted.host
    for node in () if wanted.filter.root is None else _all_of(wanted.filter.root):
        match node:
            case Ports(low=low, high=high) if low == high:
                found["port"] = low
            case Equal(field="proto", values=(number,)):
                found["proto"] = PROTO_NAMES[number]
            case Equal(field="tgid", values=(pid,)):
                found["pid"] = pid
            case Equal(field="netns", values=(inode,)):
                found["netns"] = inode
    return found


def _all_of(node: Node) -> Iterator[Node]:
    """Return nodes that all must fit if `node` fits."""
    if not isinstance(node, Chain):
        return iter((node,))
    found = list(_all_of(node.first))
    for word, other in node.rest:  # from left to right: both bind equally
        found = [*found, *_all_of(other)] if word == "and" else []
    return iter(found)


def tell(ask: Ask, range: Range, keep: Keep) -> bool:
    """Give all flows of the range to `keep`, each once, with their processes.

    Returns whether they are all.
    """
    known: set[int] = set()
    since_ns = range.since_ns
    while True:
        began_ns, before = time.time_ns(), len(known)
        several, whole = _tell(ask, Range(since_ns, range.until_ns), keep, known)
        if not several or not whole or len(known) == before:
            return whole
        since_ns = began_ns  # what was seen again meanwhile is on none of the later pages


def _tell(ask: Ask, range: Range, keep: Keep, known: set[int]) -> tuple[bool, bool]:
    """Return whether the answer had several pages, and whether they had all.

    The daemon reads all that is between the two moments of a question. So each page after the first
    goes back as far as the one before it. If that one was not full, it goes twice as far.
    """
    limit, seen_until = _MOST, None
    since_s = began_s = range.since_ns / 1e9
    width = 0.0
    several = False
    while True:
        now = time.time()
        since, until = now - since_s + _LATE, now - range.until_ns / 1e9
        answer = ask(since=since, until=max(until, 1e-3), seen_until=seen_until, limit=limit)
        flows = answer["flows"]
        if answer["processes_cut"] and limit > 1:
            limit //= 2
            continue
        keys = [hash(tuple(one[name] for name in _KEY)) for one in flows]
        new = [(key, one) for key, one in zip(keys, flows, strict=True) if key not in known]
        known.update(keys)
        keep([one for _, one in new], answer["processes"])
        oldest = flows[-1]["last"] if flows else since_s
        if answer["total"] > len(flows):
            if not new or len(known) >= _ALL:
                return several, False
            several = True
            width = flows[0]["last"] - oldest
        elif since_s <= began_s:
            return several, True
        else:
            oldest, width = min(oldest, since_s), 2 * width
        seen_until = oldest + _ROUNDED
        since_s = max(began_s, oldest - width)


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
        "parents": [f"{parent['pid']} {parent['comm']}" for parent in one.get("parents", ())],
        "uid": one["uid"],
        "user": str(one["uid"]),
        "namespace": one.get("namespace") or None,
        "sha256": one.get("sha256") or None,
    }
