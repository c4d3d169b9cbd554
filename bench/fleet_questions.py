# SPDX-License-Identifier: MIT
"""Questions to the flows of 2,000 hosts, each with a range of time: milliseconds for an answer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fleet.ask.ends import ends
from fleet.ask.hosts import hosts_of
from fleet.ask.map import service_map
from fleet.ask.questions import new, usage, who
from fleet.ask.store import FlowStore, Range, open_folder
from fleet.ask.wanted import Wanted
from fleet_flows import BEGIN_NS, HOSTS, address, write
from nlproto.filters.parse import parse
from results import put, table

_ROWS, _HOURS = 100_000_000, 72
_AT_S = 200_000
"""Where the ranges begin, in seconds since the first flow."""
_TIMES = 9
_IMPORTS = "import fleet.ask.ends, fleet.ask.map, fleet.ask.questions, hunter.fleet.fleet"

_QUESTIONS: list[tuple[str, int, Callable[[FlowStore], int]]] = [
    ("who, a port", 300, lambda store: who(store, Wanted(parse("port 5012")), 50)[0]),
    ("who, a far host", 300, lambda store: who(store, Wanted(host=address(77)), 50)[0]),
    ("who, a program", 300, lambda store: who(store, Wanted(parse("pname program7")), 50)[0]),
    ("usage by process", 600, lambda store: usage(store, Wanted(), "process", 50)[0]),
    ("new destinations", 600, lambda store: new(store, Wanted(), "destination", 0, 50)[0]),
    ("ends, a port", 300, lambda store: ends(store, Wanted(parse("port 5012")), 50)[0]),
    ("map, both ends of all", 600, lambda store: service_map(store, Wanted(), "unit", 50)[0]),
]


def measure(folder: Path, until_s: int) -> list[list[str]]:
    """Return a row for each question: range, answers, best times of opening to answer in ms.

    `until_s`: seconds that the flows are long.
    """
    begin = BEGIN_NS + min(_AT_S, until_s * 2 // 3) * 10**9
    found = []
    for name, seconds, question in _QUESTIONS:
        best = best_cpu = float("inf")
        for _ in range(_TIMES):
            start, used = time.perf_counter(), time.process_time()
            with open_folder(folder, Range(begin, begin + seconds * 10**9)) as store:
                answers = question(store)
                hosts = hosts_of(store)
            best = min(best, time.perf_counter() - start)
            best_cpu = min(best_cpu, time.process_time() - used)
        assert len(hosts) == HOSTS and all(one.whole for one in hosts)
        times = (f"{1000 * one:,.0f}" for one in (best_cpu, best))
        found.append([name, f"{seconds // 60} min", f"{answers:,}", *times])
        print(*found[-1], flush=True)
    found.append(["(start of the program)", "", "", *_start()])
    return found


def _start() -> tuple[str, str]:
    """What Python and its libraries take before the question: CPU and wall time in ms."""
    best = best_cpu = float("inf")
    for _ in range(_TIMES):
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-I", "-c", _IMPORTS], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, time.perf_counter() - start)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best_cpu = min(best_cpu, used)
    return f"{1000 * best_cpu:,.0f}", f"{1000 * best:,.0f}"


def main() -> None:
    """ROWS HOURS FOLDER; the folder is written if it is not there."""
    rows, hours = (int(one) for one in (sys.argv[1:3] or (_ROWS, _HOURS)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(temporary)
        if not (folder / "flows").is_dir():
            write(folder, rows, hours)
        size = sum(path.stat().st_size for path in (folder / "flows").rglob("*.parquet"))
        made = table(
            ["question", "range", "answers", "ms of CPU", "ms"],
            measure(folder, hours * 3600),
        )
    load = os.getloadavg()[0]
    put(
        f"Questions to {rows / 1e6:,.0f} M flows of {HOSTS:,} hosts",
        f"bench/fleet_questions.py {rows} {hours}",
        f"{hours} h of Parquet (six hours, again and again at their own times), "
        f"{size / rows:.1f} bytes a flow; two threads of DuckDB. From opening"
        f" the folder to the answer and to which hosts were silent: the best of {_TIMES}, at load"
        f" {load:.0f} on {os.cpu_count()} processors.\n\n{made}",
    )


if __name__ == "__main__":
    main()
