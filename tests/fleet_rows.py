# SPDX-License-Identifier: MIT
"""A folder as collectors write it, of rows that a test chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from fleet import schema
from fleet.ask.store import FlowStore, Range, open_folder
from fleet.collect.known_batches import KnownBatches
from fleet.collect.parquet import write_file

__all__ = ["BEGIN", "FIRST", "RANGE", "Folder", "S", "alone", "joined"]

S = 10**9
BEGIN = 1_779_926_400 * S  # an hour's beginning
RANGE = Range(BEGIN + 600 * S, BEGIN + 1200 * S)
FIRST = BEGIN + 700 * S


class Folder:
    """What collectors wrote, a batch a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {"flows": [], "procs": [], "account": []}
        self._numbers = itertools.count(1)

    def flow(
        self,
        host: str,
        local: str,
        remote: str,
        program: str = "",
        first: int = FIRST,
        last: int | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """One row; `local` and `remote` are "address:port"."""
        (laddr, lport), (raddr, rport) = (one.rsplit(":", 1) for one in (local, remote))
        number = next(self._numbers)
        tgid = more.pop("tgid", number + 1000 if program else 0)
        row = dict.fromkeys(schema.FLOWS.names) | {
            "host": host, "boot": f"boot-{host}", "sequence": number, "netns": 1,
            "cookie": number, "protocol": 6, "laddr": laddr, "lport": int(lport), "raddr": raddr,
            "rport": int(rport), "forwarded": False, "tgid": tgid, "start_ns": 5 if tgid else 0,
            "uid": 0, "comm": program[:15], "how": "socket" if tgid else "no_socket", "flags": 0,
            "first_ns": first, "last_ns": first + S if last is None else last,
            "packets_out": 1, "bytes_out": 100, "packets_in": 2, "bytes_in": 200,
        } | more  # fmt: skip
        self.rows["flows"].append(row)
        if program:
            self.process(host, tgid, program)
        return row

    def process(self, host: str, tgid: int, program: str, **more: Any) -> None:
        row = dict.fromkeys(schema.PROCS.names) | {
            "host": host, "boot": f"boot-{host}", "sequence": next(self._numbers), "tgid": tgid,
            "start_ns": 5, "at_ns": FIRST, "comm": program[:15], "name": program,
        } | more  # fmt: skip
        self.rows["procs"].append(row)

    def account(self, host: str, times: Iterable[int] = range(600, 1201, 60), **more: Any) -> None:
        """Its own account at so many seconds."""
        zero = {name: 0 for name in schema.ACCOUNT.names[4:11]}
        for at in times:
            lost = {name: value * (at - 600) for name, value in more.items()}
            row = {"host": host, "boot": f"boot-{host}", "sequence": next(self._numbers)}
            self.rows["account"].append(row | zero | {"at_ns": BEGIN + at * S} | lost)

    def rollup(
        self,
        host: str,
        program: str,
        remote: str,
        service: int,
        initiated: bool | None,
        hour_ns: int,
    ) -> None:
        folder = self.path / "rollup" / schema.hour_name(hour_ns)
        folder.mkdir(parents=True)
        row = dict.fromkeys(schema.ROLLUP.names) | {
            "hour_ns": hour_ns, "host": host, "name": program, "remote": remote, "protocol": 6,
            "service": service, "initiated": initiated,
        }  # fmt: skip
        write_file(
            folder / "part-0.parquet", pa.Table.from_pylist([row], schema.ROLLUP), KnownBatches()
        )

    def write(self, part: str = "part-1.parquet") -> None:
        for kind, columns in schema.TABLES.items():
            at = "last_ns" if kind == "flows" else "at_ns"
            hours: dict[str, list[dict[str, Any]]] = {}
            for row in self.rows[kind]:
                hours.setdefault(schema.hour_name(row[at]), []).append(row)
            (self.path / kind).mkdir(parents=True, exist_ok=True)
            for hour, rows in hours.items():
                folder = self.path / kind / hour
                folder.mkdir(exist_ok=True)
                keys = KnownBatches((row["host"], row["boot"], row["sequence"]) for row in rows)
                write_file(folder / part, pa.Table.from_pylist(rows, columns), keys)

    def open(self, range: Range = RANGE) -> FlowStore:
        self.write()
        return open_folder(self.path, range)


def joined(found: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """{(client's machine and program, server's)} of the connections that have both."""
    return {
        (f"{c['host']} {c['program']}", f"{s['host']} {s['program']}")
        for one in found
        if (c := one["client"]) and (s := one["server"])
    }


def alone(found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{machine and program: why the other end is missing}."""
    return {
        f"{side['host']} {side['program']}": "ambiguous" if one["ambiguous"] else one["reason"]
        for one in found
        if (side := one["client"] or one["server"]) and not (one["client"] and one["server"])
    }
