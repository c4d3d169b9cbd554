# SPDX-License-Identifier: MIT
"""Lines, columns and text: what people and files get to see of a record."""

from __future__ import annotations

import csv
import io
import ipaddress
import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunter.save.capturefile import CaptureFile
from hunter.save.save_lines import LINES, LineSaver
from hunter.show import names
from hunter.show.columns import COLUMNS, columns_of_batch
from hunter.show.lines import LinePrinter, Style, tcp_flags
from hunter.show.summary import Summary
from hunter.show.text import cell, plain, uncell
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.processes import Process, Processes
from waiting import until

NOON_NS = 1_780_000_000_123_456_789
NOON = "2026-05-28T20:26:40.123456Z"


def batch(*rows: Any) -> NamedBatch:
    records = np.zeros(len(rows), wire.RECORD)
    for record, fields in zip(records, rows, strict=True):
        values = {
            "saddr": "127.0.0.1",
            "daddr": "127.0.0.1",
            "sport": 50000,
            "dport": 8080,
            "proto": socket.IPPROTO_TCP,
            "dir": wire.lib.SNIFFER_DIR_OUT,
            "how": wire.lib.SNIFFER_HOW_CONTEXT,
            "len": 60,
            "tgid": 1234,
            "start_ns": 7,
            "uid": 1000,
            "netns": 99,
            "comm": b"curl",
            "tcp_flags": 2,
        } | fields
        for end in ("saddr", "daddr"):
            address = ipaddress.ip_address(values[end])
            values[end] = list(address.packed.ljust(16, b"\0"))
            record["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
        for name, value in values.items():
            record[name] = value
    return NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(NOON_NS, 0))


def processes(**fields: Any) -> Any:
    known = Processes()
    known.restore([Process(tgid=1234, start_ns=7, **fields)])
    return known


def nobody(cookies: set[int]) -> dict[int, list[Any]]:
    return {}


def printed(given: Any, known: Any = None, holders: Any = nobody, **style: Any) -> Any:
    how = Style(**({"numbers": True, "times": 1} | style))
    printer = LinePrinter(how, known or Processes(), holders, names.HostNames(), io.StringIO())
    return printer.lines(given)


def test_lines_of_a_file_name_the_namespace_once_there_are_several() -> None:
    (one,) = printed(batch({}))
    assert "netns" not in one
    lines = printed(batch({}, {"netns": 100}, {"netns": 0}))
    assert [line.partition(" netns ")[2] for line in lines] == ["99", "100", ""]
    lines = printed(batch({}, {"netns": 100}), netns=99)
    assert [line.partition(" netns ")[2] for line in lines] == ["", "100"]


def test_the_summary_counts_equal_addresses_of_two_namespaces_apart() -> None:
    summary = Summary()
    summary.add(batch({}, {"netns": 100}, {"netns": 100}))
    ((_, packets, _, ends),) = summary.figures().values()
    assert (packets, ends) == (3, 2)


def test_the_summary_of_many_processes_is_bounded_and_its_sums_are_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hunter.show.summary._MOST", 100)
    monkeypatch.setattr("hunter.show.summary._MAX_ALL_PEERS", 90)
    summary = Summary()
    big = {"tgid": 7, "start_ns": 5, "len": 5000, "comm": b"big"}
    for first in range(1000, 3000, 50):
        summary.add(batch(big, *({"tgid": tgid, "len": 60} for tgid in range(first, first + 50))))
    figures = summary.figures()
    assert len(figures) <= 101 and figures[7, 5, 0][1:3] == (40, 200_000)
    assert sum(one[1] for one in figures.values()) == 2040
    assert sum(one[2] for one in figures.values()) == 320_000
    assert sum(one[3] for one in figures.values()) <= 90
    summary.show(Processes(), to_output=True)
    shown = capsys.readouterr().out
    assert "0+   others" in shown and "1   big" in shown


def saved(kind: Any, given: Any, known: Any, path: Any, holders: Any = nobody) -> str:
    with CaptureFile(str(path)) as file:
        LineSaver(file, LINES[kind]).add(columns_of_batch(given, known, holders))
    return str(path.read_text())


def test_a_line_has_time_direction_ends_length_flags_and_owner() -> None:
    line = printed(batch({}), times=2)
    assert line == [
        "1780000000.123456 out tcp 127.0.0.1.50000 > 127.0.0.1.8080 len 60 [S] curl.1234"
    ]


def test_an_unnamed_packet_says_why() -> None:
    row = {"how": wire.lib.SNIFFER_HOW_SOCKET_GONE, "tgid": 0, "comm": b"", "dir": 1}
    assert printed(batch(row)) == [
        "in  tcp 127.0.0.1.50000 > 127.0.0.1.8080 len 60 [S] - (socket gone)"
    ]


def test_the_unit_or_the_container_follows_the_owner() -> None:
    assert printed(batch({}), processes(unit="nginx.service"))[0].endswith(
        "curl.1234 nginx.service"
    )
    known = processes(unit="docker.service", container="docker:0123456789ab")
    assert printed(batch({}), known)[0].endswith("curl.1234 docker:0123456789ab")


def test_quiet_leaves_out_flags_and_place() -> None:
    assert printed(batch({}), processes(unit="nginx.service"), quiet=True) == [
        "out tcp 127.0.0.1.50000 > 127.0.0.1.8080 len 60 curl.1234"
    ]


def test_verbose_tells_the_rule_the_executable_and_the_holders() -> None:
    given = batch({"flags": wire.lib.SNIFFER_F_SHARED, "cookie": 5})

    def holders(cookies: Any) -> dict[Any, list[dict[str, Any]]]:
        return {
            cookie: [{"pid": 1, "comm": "a"}, {"pid": 2, "comm": "b\x1b"}] for cookie in cookies
        }

    line = printed(given, processes(exe="/usr/bin/curl"), holders, verbose=1)[0]
    assert "(how context, uid 1000, exe /usr/bin/curl, shared, held by a.1, b\\x1b.2)" in line


def test_times_since_the_last_and_since_the_first() -> None:
    given = batch({"time_ns": 0}, {"time_ns": 1_500_000_000}, {"time_ns": 2_000_000_000})
    assert [line.split()[0] for line in printed(given, times=3)] == [
        "00:00:00.000000",
        "00:00:01.500000",
        "00:00:00.500000",
    ]
    assert printed(given, times=5)[2].startswith("00:00:02.000000 ")


def test_six_and_udp_lines() -> None:
    row = {"saddr": "fe80::1", "daddr": "2001:db8::2", "proto": socket.IPPROTO_UDP, "dport": 53}
    assert printed(batch(row)) == ["out udp fe80::1.50000 > 2001:db8::2.53 len 60 curl.1234"]
    named = printed(batch(row), numbers=False)
    assert named == ["out udp fe80::1.50000 > 2001:db8::2.domain len 60 curl.1234"]


@pytest.mark.parametrize(
    ("flags", "text"), [(2, "S"), (18, "S."), (16, "."), (0, "none"), (25, "FP.")]
)
def test_tcp_flags_read_as_in_tcpdump(flags: int, text: str) -> None:
    assert tcp_flags(flags) == text


def test_csv_has_the_agreed_columns_and_values(tmp_path: Path) -> None:
    rows = batch({}, {"how": wire.lib.SNIFFER_HOW_FORWARDED, "tgid": 0, "dir": 3, "comm": b""})
    text = saved("csv", rows, processes(exe="/usr/bin/curl"), tmp_path / "x.csv")
    ends, flow = "tcp,127.0.0.1,50000,127.0.0.1,8080,60", "1:bwaxBSrjQiL/QKPJx556VoDZ60U="
    assert text == (
        "time,dir,proto,src,sport,dst,dport,len,pid,comm,exe,uid,netns,how,"
        "flags,tcp_flags,interface,unit,container,cmdline,ppid,segments,hdr_len,ifindex,start_ns,"
        "tid,creator,cookie,holders,community_id,container_name,image,pod,parents,sha256,domain,"
        "nat_src,nat_sport,nat_dst,nat_dport\n"
        f"{NOON},out,{ends},1234,curl,/usr/bin/curl,1000,99,context,,S,,,,,,1,0,,7,,,,,{flow},,,,,,,,,,\n"
        f"{NOON},fwd,{ends},,,,,99,forwarded,,S,,,,,,1,0,,,,,,,{flow},,,,,,,,,,\n"
    )


def test_json_lines_have_the_same_keys_and_holders_when_shared(tmp_path: Path) -> None:
    rows = batch({}, {"flags": wire.lib.SNIFFER_F_SHARED, "cookie": 5})

    def holders(cookies: Any) -> dict[int, list[dict[str, Any]]]:
        assert cookies == {5}
        return {5: [{"pid": 1, "comm": "a"}, {"pid": 1234, "comm": "curl"}]}

    text = saved("jsonl", rows, processes(exe="/usr/bin/curl"), tmp_path / "x.jsonl", holders)
    first, second = map(json.loads, text.splitlines())
    assert tuple(first) == tuple(second) == COLUMNS
    assert first["time"] == NOON and first["pid"] == 1234 and first["sport"] == 50000
    assert first["holders"] is None and (first["flags"], second["flags"]) == (None, "shared")
    assert [one["pid"] for one in second["holders"]] == [1, 1234]


HOSTILE = {
    "escape": b"\x1b[2Jx",
    "newline": b"a\nb,c",
    "markup": b"[/red]",
    "formula": b"=cmd()",
    "script": b"<script>",
    "not utf-8": b"\xff\xfe\x9b31m",
    "c1": "\x9b31m".encode(),
    "bidi": "\u202egpj".encode(),
    "quote": b'",""',
    "plus": b"+1+cmd|' /C'!A0",
}


@pytest.mark.parametrize("comm", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("output", ["line", "verbose", "terminal", "csv", "jsonl"])
def test_a_hostile_name_is_harmless(
    comm: Any, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = batch({"comm": comm})
    name = wire.text(comm)
    known = processes(exe="/tmp/" + name, unit=name, container=name)
    if output == "terminal":
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda: True)
        LinePrinter(Style(True, times=1, verbose=2), known, nobody, names.HostNames(), out).add(
            rows
        )
        text = out.getvalue()
    elif output == "csv":
        text = saved("csv", rows, known, tmp_path / "x.csv")
        header, row = csv.reader(io.StringIO(text))
        fields = dict(zip(header, row, strict=True))
        assert len(row) == len(COLUMNS)
        assert all(not field.startswith(tuple("=+-@\t\r")) for field in row)
        assert {uncell(fields[key]) for key in ("comm", "unit", "container")} == {name}
        assert plain(fields["comm"]) == fields["comm"]
    elif output == "jsonl":
        text = saved("jsonl", rows, known, tmp_path / "x.jsonl")
        assert json.loads(text)["comm"] == name
    else:
        text = "\n".join(printed(rows, known, verbose=2 if output == "verbose" else 0)) + "\n"
    lines = text.splitlines()
    assert len(lines) == (2 if output == "csv" else 1)
    body = lines[-1]
    assert "\x1b[2J" not in body and "\x1b]" not in body
    assert all(c.isprintable() or c == "\x1b" and output == "terminal" for c in body)
    if output in ("line", "verbose"):
        assert plain(name) in body


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("nginx", "'quoted", "python3.11", "Gerät", "kworker/0:1-ev", "日本", r"C:\a\b"):
        assert cell(name) == plain(name) == name
    assert plain("-bash") == "-bash"


def test_addresses_are_text_of_their_family() -> None:
    table = columns_of_batch(batch({"saddr": "fe80::1", "daddr": "::1"}), Processes())
    assert (table.src, table.dst) == (["fe80::1"], ["::1"])


def test_names_in_this_machines_own_files_are_there_at_once(tmp_path: Path) -> None:
    path, none = tmp_path / "file", str(tmp_path / "none")
    path.write_text(
        "# ours\n127.0.0.1 localhost here\n::1\tip6-localhost # loopback\n\n10.0.0.1 # nobody\n"
        "127.0.0.1 second\n"
    )
    assert names.own_hosts(str(path)) == {"127.0.0.1": "localhost", "::1": "ip6-localhost"}
    path.write_text("#\nhttp\t80/tcp www\nhttp 80/udp\nweb 80/tcp\nbad\nbad x/tcp\nbad 80\n")
    assert names.services(str(path)) == {(80, "tcp"): "http", (80, "udp"): "http"}
    path.write_text("root:x:0:0::/:/bin/sh\ntoor:x:0:0::/:/bin/sh\n\n+::::::\nme:x:1000:\n")
    assert names.own_users(str(path)) == {0: "root", 1000: "me"}
    assert not names.own_hosts(none) and not names.services(none) and not names.own_users(none)


def test_a_directory_that_does_not_answer_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(uid: int) -> str:
        asked.set()
        answer.wait()
        return f"user{uid}"

    monkeypatch.setattr(names, "user", slow)
    with names.HostNames() as known:
        assert known.user(4_000_000_000) == "4000000000"
        assert asked.wait(60)
        assert known.host("192.0.2.1") == "192.0.2.1" and known.user(0) == "root"
        answer.set()
        until(lambda: known.user(4_000_000_000) == "user4000000000", 60)
