# SPDX-License-Identifier: MIT
"""Questions to the flows of 2,000 hosts, each with a range of time: milliseconds for an answer."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fleet.ask.ends import ends
from fleet.ask.hosts import hosts_of
from fleet.ask.map import service_map
from fleet.ask.questions import new, usage, who
from fleet.ask.store import Range, Store, open_folder
from fleet.ask.wanted import Wanted
from fleet_flows import BEGIN_NS, HOSTS, address, write
from nlproto.filters.parse import parse
from results import put, table

_ROWS, _HOURS = 10_000_000, 24
_AT_S = 40_000
"""Where the ranges begin, in seconds since the first flow."""
_TIMES = 3

_QUESTIONS: list[tuple[str, int, Callable[[Store], int]]] = [
    ("who, a port", 300, lambda store: who(store, Wanted(parse("port 5012")), 50)[0]),
    ("who, a far host", 300, lambda store: who(store, Wanted(host=address(77)), 50)[0]),
    ("who, a program", 300, lambda store: who(store, Wanted(parse("pname program7")), 50)[0]),
    ("usage by process", 600, lambda store: usage(store, Wanted(), "process", 50)[0]),
    ("new destinations", 600, lambda store: new(store, Wanted(), "destination", 0, 50)[0]),
    ("ends, a port", 300, lambda store: ends(store, Wanted(parse("port 5012")), 50)[0]),
    ("map, both ends of all", 600, lambda store: service_map(store, Wanted(), "unit", 50)[0]),
]


def measure(folder: Path) -> list[list[str]]:
    """Return a row for each question: range, answers, best and worst time of opening to answer."""
    found = []
    for name, seconds, question in _QUESTIONS:
        begin = BEGIN_NS + _AT_S * 10**9
        times = []
        for _ in range(_TIMES):
            start = time.perf_counter()
            with open_folder(folder, Range(begin, begin + seconds * 10**9)) as store:
                answers = question(store)
                hosts = hosts_of(store)
            times.append(time.perf_counter() - start)
        assert len(hosts) == HOSTS and all(one.whole for one in hosts)
        best, first = (f"{1000 * one:,.0f}" for one in (min(times), times[0]))
        found.append([name, f"{seconds // 60} min", f"{answers:,}", best, first])
        print(*found[-1], flush=True)
    return found


def main() -> None:
    """ROWS HOURS FOLDER; the folder is written if it is not there."""
    rows, hours = (int(one) for one in (sys.argv[1:3] or (_ROWS, _HOURS)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(temporary)
        if not (folder / "flows").is_dir():
            write(folder, rows, hours)
        size = sum(path.stat().st_size for path in (folder / "flows").rglob("*.parquet"))
        made = table(
            ["question", "range", "answers", "ms, best", "ms, first"],
            measure(folder),
        )
    put(
        f"Questions to {rows / 1e6:,.0f} M flows of {HOSTS:,} hosts",
        f"bench/fleet_questions.py {rows} {hours}",
        f"{hours} h of Parquet, {size / rows:.1f} bytes a flow. From opening the folder to the"
        f" answer and to which hosts were silent.\n\n{made}",
    )


if __name__ == "__main__":
    main()
