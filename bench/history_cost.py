# SPDX-License-Identifier: MIT
"""A month of history at 100 flows a second: its size, and questions to it (make bench-history).

Eight hours are made and sealed as the daemon seals them. The month is made of these: each hour of
it has the bytes of one of the eight with later times. One program and one host are in a single
hour. Questions are asked of the files alone, in a process of their own. "cold": no page of any file
is in the page cache, as of mincore(2) for the largest hour; "best" of four more times after it.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import mmap
import os
import shutil
import sqlite3
import tempfile
import time
import zlib
from typing import Any

import msgspec
import numpy as np

from daemon.history import sealed
from daemon.history.details import encoded, places_in, sums
from daemon.history.hours import HourFile, Hours
from daemon.history.memory import Question
from daemon.history.sealed import SEALED_COLUMNS, Contents
from daemon.history.store import Store
from history_flows import HOUR_NS, flows_of_hour, processes_of
from results import put, table

FLOWS = 360_000
DISTINCT = 8
BEGIN_NS = 1_780_000_000 * 10**9
FOREVER = 2**62
RARE = ipaddress.ip_network("198.51.100.7/32")


def contents(flows: np.ndarray) -> Contents:
    rows = {name: flows[name] for name in (flows.dtype.names or ()) if name in SEALED_COLUMNS}
    rows["id"] = np.arange(1, len(flows) + 1, dtype=np.uint64)
    rows["payer"], rows["seen"] = flows["uid"], np.zeros(len(flows), np.int64)
    details = {one.key: encoded(one) for one in processes_of(flows)}
    return Contents(rows, details, sums(rows, places_in(details)), {})


def later(data: bytes, shift_ns: int) -> bytes:
    """The same hour at another time: moments stand in the index alone."""
    length, _, magic = sealed._TAIL.unpack(data[-sealed._TAIL.size :])
    end = len(data) - sealed._TAIL.size
    index = msgspec.json.decode(data[end - length : end])
    last = SEALED_COLUMNS.index("last_ns")
    for group in index["groups"]:
        group["oldest_ns"] += shift_ns
        group["newest_ns"] += shift_ns
        group["packing"][last][0] += shift_ns
    raw = msgspec.json.encode(index)
    tail = sealed._TAIL.pack(len(raw), zlib.crc32(raw), magic)
    return data[: end - length] + raw + tail


def month(folder: str, hours: int) -> tuple[float, float]:
    """Make the files; (CPU seconds to seal an hour, bytes a flow)."""
    made: list[tuple[bytes, HourFile]] = []
    took = 0.0
    path = os.path.join(folder, "history.db")
    Store(path).close()
    for seed in range(DISTINCT + 1):
        flows = flows_of_hour(FLOWS, BEGIN_NS, seed + 1)
        if seed == DISTINCT:  # the hour of what happened once
            flows["comm"][5000:5003] = b"exfiltrate"
            flows["raddr"][5000:5003] = np.frombuffer(
                RARE.network_address.packed.ljust(16, b"\0"), np.uint64
            )
        began = time.process_time()
        one = contents(flows)
        data = sealed.seal(one)
        took += time.process_time() - began
        rows = one.rows
        piece = HourFile(
            0,
            FLOWS,
            len(data),
            FLOWS,
            int(rows["first_ns"].min()),
            int(rows["last_ns"].min()),
            int(rows["last_ns"].max()),
            0,
            [(0, "-", FLOWS)],
        )
        made.append((data, piece))
    size = 0
    with sqlite3.connect(path) as base:
        for number in range(1, hours + 1):
            which = DISTINCT if number == hours // 3 else number % DISTINCT
            data, piece = made[which]
            shift = number * HOUR_NS
            moved = later(data, shift)
            size += len(moved)
            piece = msgspec.structs.replace(
                piece,
                number=number,
                bytes=len(moved),
                last_id=number * FLOWS,
                begin_ns=piece.begin_ns + shift,
                oldest_ns=piece.oldest_ns + shift,
                newest_ns=piece.newest_ns + shift,
            )
            Hours._enter(base, piece)
            with open(path + piece.name, "wb") as file:
                file.write(moved)
    base.close()
    return took / (DISTINCT + 1), size / hours / FLOWS


def questions(end_ns: int, hours: int) -> dict[str, dict[str, Any]]:
    old = end_ns - min(20 * 24, hours // 2) * HOUR_NS
    return {
        "port 5432, last 5 minutes": {"port": 5432, "since_ns": end_ns - 300 * 10**9},
        "program curl, last hour": {"pname": "curl", "since_ns": end_ns - HOUR_NS},
        "who had the host at one moment long ago": {"host": RARE, "at_ns": old},
        "port 5432": {"port": 5432},
        "program curl": {"pname": "curl"},
        "port 9, which nothing has": {"port": 9},
        "a program of one hour": {"pname": "exfiltrate"},
        "a host of one hour": {"host": RARE},
        "that program and that host": {"pname": "exfiltrate", "host": RARE},
        "a program that never ran": {"pname": "never"},
        "all of a user": {"uid": 1000},
    }


def forget(folder: str) -> None:
    """Take every page of the files out of the page cache. Raises AssertionError if some stay."""
    for name in os.listdir(folder):
        handle = os.open(os.path.join(folder, name), os.O_RDONLY)
        try:
            os.fsync(handle)  # only what is written can go
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    largest = max(os.scandir(folder), key=lambda one: one.stat().st_size)
    assert resident(largest.path) == 0, f"{largest.path} is still in the page cache"


def resident(path: str) -> int:
    """How many pages of a file are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as pages:
        size = len(pages)
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(pages)
        code = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), found
        )
        del begin
    assert code == 0, "mincore"
    return sum(one & 1 for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=int, default=720)
    parser.add_argument("--folder", default=None, help="where (8 GB); a temporary one")
    words = parser.parse_args()
    folder = tempfile.mkdtemp(dir=words.folder)
    try:
        seconds, each = month(folder, words.hours)
        store = Store(os.path.join(folder, "history.db"))
        end_ns = BEGIN_NS + (words.hours + 1) * HOUR_NS
        rows = []
        for text, conditions in questions(end_ns, words.hours).items():
            times = []
            forget(folder)
            for _ in range(5):
                began = time.perf_counter()
                found = store.ask(Question(**conditions, limit=100), FOREVER)
                times.append((time.perf_counter() - began) * 1e3)
            rows.append([text, f"{len(found[:100])}", f"{times[0]:,.0f}", f"{min(times):,.0f}"])
        forget(folder)
        began = time.perf_counter()
        groups = sum(len(part) for part, _ in store.hours.usage(store.hours.pieces, 0, _never))
        used = (time.perf_counter() - began) * 1e3
        rows.append(["usage of all", f"{groups:,}", f"{used:,.0f}", ""])
        store.close()
    finally:
        shutil.rmtree(folder)
    body = (
        f"{__doc__.partition(chr(10) * 2)[2]}\n{words.hours} hours of {FLOWS:,} flows: {each:.1f}"
        f" bytes a flow with all its indexes and the details of its processes,"
        f" {each * FLOWS * words.hours / 1e9:.1f} GB; a month at 100 flows/s"
        f" {each * 100 * 86400 * 30 / 1e9:.1f} GB. Sealing an hour: {seconds:.1f} s of CPU"
        f" without the database's part.\n\n"
        + table(["question (100 rows)", "rows", "cold, ms", "best, ms"], rows)
    )
    put("A month of history", "make bench-history", body)


def _never() -> None:
    pass


if __name__ == "__main__":
    main()
