# SPDX-License-Identifier: MIT
"""hunter stats: the daemon's account and sizes at a glance."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunter.console import Output
from hunter.text import plain
from nlproto.client import DaemonClient

__all__ = ["run"]

# Of the engine's figures: what never changes, and what the account says already.
_CONSTANTS = {
    *("instance", "engine", "version", "record_size", "batch", "flush_ms", "receive_bytes"),
    *("packets", "recorded", "records"),
}


def run(options: argparse.Namespace) -> None:
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
        f"daemon {figures['version']}, pid {figures['pid']}, engine {figures['engine']}"
        f", up {_span(time.time() - figures['started'])}"
    )
    account = figures.get("account")
    if account is None:
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
            f"{key.replace('_', ' ')} {_number(key, value)}"
            for key, value in part.items()
            if value and not isinstance(value, (Mapping, list)) and key not in _CONSTANTS
        )
        table.add_row(Text(name.replace("_", " "), style="bold"), Text(plain(facts)))
    console.print(table)
    history = figures.get("history") or {}
    if store := history.get("store"):
        _show_store(store, history.get("unstored", 0), console)


def _show_store(store: Mapping[str, Any], unstored: int, console: Console) -> None:
    """One line on the history's file, in red when it cannot be written."""
    waiting = f"{store['waiting_flows']:,} flows and {store['waiting_processes']:,} processes"
    lost = unstored + store["unstored_processes"]
    line = f"history {store['path']}, {store['bytes']:,} bytes"
    if store["error"]:
        line = f"{store['error']}: {waiting} wait in memory"
    if lost:
        line += (
            f"; {unstored:,} flows and {store['unstored_processes']:,} processes left memory"
            " before they were written"
        )
    console.print(Text(plain(line), style="red" if store["error"] or lost else ""))


def _account(account: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    delivered, named = account["delivered"], account["named"]
    share = f"{100 * named / delivered:.2f} %" if delivered else ""
    unnamed = account["unnamed"]
    lost = {place: n for place, n in account["lost"].items() if n}
    rows = [
        ("packets seen", account["packets"], ""),
        ("recorded", account["recorded"], ""),
        ("records delivered", delivered, ""),
        ("named", named, share),
        ("unnamed", sum(unnamed.values()), _detail(unnamed)),
        ("being named", account["waiting"], ""),
        ("lost", sum(lost.values()), _detail(lost)),
    ]
    for name, count, more in rows:
        if name == "being named" and not count:
            continue
        bad = name == "lost" and count
        table.add_row(name, Text(f"{count:,}", style="bold red" if bad else "bold"), Text(more))
    return table


def _detail(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())


def _number(key: str, value: object) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        return str(value)
    return f"{value.bit_count() if key.startswith('probes_') else value:,}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
