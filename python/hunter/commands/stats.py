# SPDX-License-Identifier: MIT
"""hunter stats: the daemon's account and sizes at a glance."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunter.cli.options import StatsOptions
from hunter.show.console import Output
from hunter.show.text import plain
from nlproto.client.client import DaemonClient
from nlproto.pipeline.figures import reasons

__all__ = ["run"]

# Figures of the engine that never change, or that the account has already.
_CONSTANTS = {
    *("instance", "engine", "version", "record_size", "batch", "flush_ms", "receive_bytes"),
    *("packets", "recorded", "records"),
}


def run(options: StatsOptions) -> None:
    """Ask and print. Raises Error."""
    with DaemonClient(options.socket) as client:
        figures = client.stats()
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures, Output())


def show(figures: Mapping[str, Any], console: Console) -> None:
    """Print the reply of op "stats" for people."""
    console.print(
        f"daemon {figures.get('version', '?')}, pid {figures.get('pid', '?')}"
        f", engine {figures.get('engine', '?')}{_up(figures.get('started'))}"
    )
    account = figures.get("account")
    if not isinstance(account, Mapping):
        console.print("the account is for root and the group packet-hunter", style="yellow")
    else:
        console.print(_account(account))
    sizes = {name: part for name, part in figures.items() if isinstance(part, Mapping)}
    sizes.pop("account", None)
    table = Table(box=box.SIMPLE, show_header=False)
    for name, part in sizes.items():
        if name == "client":
            continue
        facts = ", ".join(
            _fact(key, value)
            for key, value in part.items()
            if value and not isinstance(value, (Mapping, list)) and key not in _CONSTANTS
        )
        table.add_row(Text(name.replace("_", " "), style="bold"), Text(plain(facts)))
    console.print(table)
    history = figures.get("history")
    if isinstance(history, Mapping) and (store := history.get("store")):
        _show_store(store, history.get("unstored", 0), console)


def _show_store(store: Mapping[str, Any], unstored: int, console: Console) -> None:
    """Return one line on the history's file, in red if it cannot be written."""
    figures = ("waiting_flows", "waiting_processes", "unstored_processes", "bytes")
    flows, processes, gone, size = (store.get(name, 0) for name in figures)
    error = store.get("error", "")
    line = f"history {store.get('path', '?')}, {size:,} bytes"
    if since := store.get("since"):
        line += f", back to {datetime.fromtimestamp(since):%Y-%m-%d %H:%M}"
    if damaged := store.get("damaged_files"):
        line += f"; {damaged:,} of {store.get('sealed_files', 0):,} sealed files cannot be read"
    if error:
        line = f"{error}: {flows:,} flows and {processes:,} processes wait in memory"
    if unstored or gone:
        line += f"; {unstored:,} flows and {gone:,} processes left memory before they were written"
    console.print(Text(plain(line), style="red" if error or unstored or gone else ""))


def _account(account: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    delivered, named = account.get("delivered", 0), account.get("named", 0)
    share = f"{100 * named / delivered:.2f} %" if delivered else ""
    unnamed = account.get("unnamed", {})
    lost = {place: n for place, n in account.get("lost", {}).items() if n}
    rows = [
        ("packets seen", account.get("packets", 0), ""),
        ("recorded", account.get("recorded", 0), ""),
        ("records delivered", delivered, ""),
        ("named", named, share),
        ("unnamed", sum(unnamed.values()), reasons(unnamed, ",")),
        ("being named", account.get("waiting", 0), ""),
        ("lost", sum(lost.values()), reasons(lost, ",")),
    ]
    for name, count, more in rows:
        if name == "being named" and not count:
            continue
        bad = name == "lost" and count
        table.add_row(name, Text(f"{count:,}", style="bold red" if bad else "bold"), Text(more))
    return table


_WORDS = {
    "max_bytes": "room for",
    "peak_bytes": "most at once",
    "bytes": "waiting",
    "queued_bytes": "waiting",
    "sock_diag": "sockets asked of sock_diag",
    "known": "known",
}


def _fact(key: str, value: object) -> str:
    """Return one figure in words: sizes with units, probes as a count."""
    words = _WORDS.get(key, key.removesuffix("_bytes").replace("_", " "))
    if isinstance(value, bool):
        return words if value else f"{words}: no"
    if isinstance(value, int) and key.endswith("bytes"):
        return f"{words} {_size(value)}"
    if isinstance(value, int):
        return f"{words} {value.bit_count() if key.startswith('probes_') else value:,}"
    return f"{words} {value}"


def _size(count: int) -> str:
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _up(started: object) -> str:
    if not isinstance(started, (int, float)):
        return ""
    minutes, rest = divmod(int(max(0.0, time.time() - started)), 60)
    hours, minutes = divmod(minutes, 60)
    return f", up {hours}:{minutes:02}:{rest:02}"
