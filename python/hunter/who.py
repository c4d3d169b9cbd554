# SPDX-License-Identifier: MIT
"""hunter who: which process owns, or owned, the traffic of a port, a host or a process."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hunter import names
from hunter.console import Output
from hunter.text import plain
from nlproto import NoDaemon
from nlproto.client import DaemonClient

__all__ = ["run", "show"]


def run(options: argparse.Namespace, notify: Callable[[str], None]) -> None:
    """Ask the daemon, or the kernel's own tables when there is none; print. Raises Error."""
    remembers = True
    try:
        with DaemonClient(options.socket) as client:
            answer = client.who(
                port=options.port,
                proto=options.proto,
                host=options.host,
                pid=options.pid,
                pname=options.pname,
                since=options.since,
                limit=options.limit,
            )
    except NoDaemon as error:
        from hunter.who_now import owners_now

        if options.since or options.socket_given:
            raise
        notify(f"{error}; until then: sockets of now, of this network namespace")
        answer = owners_now(options)
        remembers = False
    if options.json:
        print(json.dumps(answer))
    else:
        console = Output(soft_wrap=True)
        show(answer, console, time.time(), remembers)


def show(answer: Mapping[str, Any], console: Console, now: float, remembers: bool = True) -> None:
    """Print the reply of op "who"; `now` is Unix time, `remembers`: it came from a daemon."""
    owners, flows = answer["owners"], answer["flows"]
    if not owners and not flows:
        console.print("nobody, now or in what is remembered" if remembers else "nobody now")
        return
    for table in (_owners(owners), _flows(flows, now), _processes(answer["processes"])):
        if table.row_count:
            # a long line may wrap in the terminal; one that is cut off answers nothing
            wanted = Measurement.get(console, console.options.update(max_width=500), table)
            console.width = max(console.width, wanted.maximum)
            console.print(table)
    if answer["truncated"]:
        more = f"the newest {len(flows)} of {answer['total']} flows; --limit N shows more"
        console.print(more, style="dim")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        right = name in ("packets", "bytes", "last", "pid")
        last = name == columns[-1]
        table.add_column(
            name, justify="right" if right else "left", no_wrap=not last, overflow="fold"
        )
    return table


def _name(comm: str, pid: int | None) -> Text:
    if pid is None:
        return Text("-", style="yellow")
    return Text(f"{plain(comm)}.{pid}", style="bold green")


def _owners(owners: Sequence[Mapping[str, Any]]) -> Table:
    shared = any(len({one["pid"] for one in owner["holders"]}) > 1 for owner in owners)
    table = _table("now", ["process", "socket", *(["shared with"] if shared else [])])
    rows: dict[tuple[str, int | None, str, str], None] = {}  # connections of a listener are one row
    for owner in owners:
        others = {one["pid"]: one["comm"] for one in owner["holders"] if one["pid"] != owner["pid"]}
        verb = "listens on" if owner["listening"] and owner["proto"] == "tcp" else "has"
        sharing = ", ".join(f"{plain(comm)}.{pid}" for pid, comm in others.items())
        socket = f"{verb} {owner['proto']} {owner['address']}.{owner['port']}"
        rows[owner["comm"], owner["pid"], socket, sharing] = None
    for comm, pid, socket, sharing in rows:
        table.add_row(_name(comm, pid), socket, *([sharing] if shared else []))
    return table


def _flows(flows: Sequence[Mapping[str, Any]], now: float) -> Table:
    """A row for each owner, both ends and direction: the last packets of a connection that is
    being closed may have no socket, and are a flow of their own in the history."""
    sums: dict[tuple[Any, ...], list[Any]] = {}
    for flow in flows:
        arrow = "-" if flow["forwarded"] else ">" if not flow["packets_in"] else "<>"
        if not flow["forwarded"] and not flow["packets_out"]:
            arrow = "<"
        ends = (flow["local"], flow["lport"], flow["remote"], flow["rport"])
        key = (flow["pid"], flow["start_ns"], flow["proto"], *ends, flow["how"])
        one = sums.setdefault(key, [flow, arrow, 0, 0, 0.0])
        if arrow != one[1]:
            one[1] = "<>"
        one[2] += flow["packets_in"] + flow["packets_out"]
        one[3] += flow["bytes_in"] + flow["bytes_out"]
        one[4] = max(one[4], flow["last"])
    table = _table("seen", ["process", "flow", "packets", "bytes", "last", "how"])
    for flow, arrow, packets, size, last in sums.values():
        table.add_row(
            _name(flow["comm"], flow["pid"]),
            f"{flow['proto']} {flow['local']}.{flow['lport']} {arrow} "
            f"{flow['remote']}.{flow['rport']}",
            f"{packets:,}",
            f"{size:,}",
            _ago(now - last),
            flow["how"].replace("_", " "),
        )
    return table


def _processes(processes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("processes", ["pid", "user", "runs in", "executable"])
    for one in sorted(processes, key=lambda one: one["tgid"]):
        user = "" if one["uid"] is None else names.user(one["uid"])
        place = one["container"] or one["unit"]
        table.add_row(str(one["tgid"]), plain(user), plain(place), plain(one["exe"] or one["comm"]))
    return table


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
