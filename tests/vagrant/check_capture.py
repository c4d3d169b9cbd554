# SPDX-License-Identifier: MIT
"""Compares a capture with the truth that traffic.py wrote: check_capture.py capture.csv truth.json

Exits 1 with the first difference.
"""

import csv
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

COLUMNS = (
    "time,dir,proto,src,sport,dst,dport,len,pid,comm,exe,uid,netns,how,"
    "flags,tcp_flags,interface,unit,container,cmdline,ppid,segments,hdr_len,ifindex,start_ns,"
    "tid,creator,cookie,holders"
).split(",")
IP_AND_UDP_HEADER = 28

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=True)
        # new ones come at the end
        expect("columns", list(reader.fieldnames or ())[: len(COLUMNS)], COLUMNS)
        rows = list(reader)
    for row in rows:
        expect(f"fields of {row}", None in row or None in row.values(), False)
    return rows


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        sys.exit(f"check_capture.py: {what}: {found!r}, not {wanted!r}")


def between(rows: list[Row], proto: str, direction: str, sport: int, dport: int) -> list[Row]:
    wanted = (proto, direction, "127.0.0.1", str(sport), "127.0.0.1", str(dport))
    names = ("proto", "dir", "src", "sport", "dst", "dport")
    return [row for row in rows if tuple(row[name] for name in names) == wanted]


def check_owner(rows: list[Row], pid: int, truth: dict[str, Any]) -> None:
    wanted = {
        "pid": str(pid),
        "exe": truth["exe"],
        "uid": str(truth["uid"]),
        "netns": str(truth["netns"]),
    }
    for row in rows:
        expect(f"owner of {row}", {name: row[name] for name in wanted}, wanted)
        when = datetime.fromisoformat(row["time"])
        expect(f"UTC offset of {row['time']}", when.utcoffset() is not None, True)
        # The wall clock of a guest may be adjusted meanwhile.
        inside = truth["began"] - 2 <= when.timestamp() <= truth["ended"] + 2
        expect(f"{row['time']} is a time of the traffic", inside, True)


def check(rows: list[Row], truth: dict[str, Any]) -> None:
    sender, receiver = truth["udp"]["from"], truth["udp"]["to"]
    lengths = [IP_AND_UDP_HEADER + size for size in range(1, truth["datagrams"] + 1)]
    for direction, pid in (("out", sender["pid"]), ("in", receiver["pid"])):
        found = between(rows, "udp", direction, sender["port"], receiver["port"])
        expect(f"lengths of UDP {direction}", [int(row["len"]) for row in found], lengths)
        check_owner(found, pid, truth)

    client, server = truth["tcp"]["from"], truth["tcp"]["to"]
    for one, other in ((client, server), (server, client)):
        for direction, pid in (("out", one["pid"]), ("in", other["pid"])):
            found = between(rows, "tcp", direction, one["port"], other["port"])
            enough = len(found) > truth["messages"]
            expect(f"TCP {direction}, port {one['port']}, enough rows", enough, True)
            check_owner(found, pid, truth)


def main(capture: str, truth: str) -> None:
    rows = read(Path(capture))
    check(rows, json.loads(Path(truth).read_text()))
    named = sum(bool(row["pid"]) for row in rows)
    print(f"check_capture.py: {len(rows)} rows, {named} named; the known traffic has its owners")


if __name__ == "__main__":
    main(*sys.argv[1:])
