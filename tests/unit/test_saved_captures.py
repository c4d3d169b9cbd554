# SPDX-License-Identifier: MIT
"""What is saved is what was seen: each format is read back to the figures of the live run."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunter.cli.signals import Stop
from hunter.formats.ownercomment import comment_of, read_comment
from hunter.save.saving import format_of, open_saver
from hunter.show.account import ShownAccount
from hunter.show.columns import COLUMNS, FIRST_COLUMNS, cells, columns_of_batch
from hunter.show.summary import Summary
from hunter.show.text import cell, escaped, plain, uncell, unescaped
from hunter.sources.source_file import FileSource
from nlproto.filters.filter import EVERYTHING
from nlproto.host.procfs import Parent
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.tables.processes import Process, Processes
from recording import make_records

SUFFIXES = [".csv", ".jsonl", ".parquet", ".pcapng", ".ecs.jsonl"]
NOON_NS = 1_780_000_000_123_456_000
NETNS = 4026532999
F = wire.lib

# every character that somebody has tripped over, and any other
NAMES = st.text(
    st.one_of(
        st.sampled_from("'=+-@;,\"\\xu{}0f \t\r\n\x00\x1b\x85\xad\u2028\u202e\udcff"),
        st.characters(),
    )
)

HOSTILE = [
    "",
    "'quoted",
    "'=quoted",
    "-2+3+cmd",
    "-bash",
    "=cmd|' /C calc'!A0",
    "@SUM(A1)",
    "+1",
    "\t=1",
    " =1",
    "\r=1",
    "a;=1+1",
    'a";=1',
    "a,b",
    '"',
    "a b.5 uid=0",
    "nobody,",
    'x" uid=0 "',
    "\\x41",
    "\\\\x5c",
    "\x85",
    "\u2028",
    "\x1b[2J",
    "日本",
]


class Everything(Processes):
    """Processes, and the names of another machine's interfaces."""

    def interface(self, netns: Any, ifindex: Any) -> Any:
        return f"eth{ifindex}" if ifindex else ""


@pytest.fixture
def everything() -> tuple[Any, ...]:
    """(batch, details, holders) with a value in every field, some as odd as they can be."""
    rows = []
    known = Everything()
    for i, name in enumerate(HOSTILE):
        comm = name.encode("utf-8", "surrogateescape")[:15]
        rows.append(
            {
                "time_ns": i * 1000,
                "tgid": 100 + i,
                "start_ns": 7_000_000_000 + i,
                "uid": i,
                "comm": comm,
                "how": F.SNIFFER_HOW_CONTEXT,
                "proto": socket.IPPROTO_TCP if i % 2 else socket.IPPROTO_UDP,
                "tcp_flags": i % 256 if i % 2 else 0,
                "len": 1500 + i,
                "gso_segs": 1 + i % 3 * 20,
                "hdr_len": 52 if i % 2 else 28,
                "ifindex": 1 + i % 3,
                "netns": NETNS,
                "tid": 5000 + i,
                "creator": 99,
                "cookie": 2**63 + i,
                "flags": (F.SNIFFER_F_DEAD | F.SNIFFER_F_AMBIGUOUS) if i % 3 else 0,
            }
        )
        known.restore(
            [
                Process(
                    100 + i,
                    7_000_000_000 + i,
                    comm=wire.text(comm),
                    uid=i,
                    exe="/bin/" + name,
                    ppid=1 + i,
                    unit=name,
                    container=name[::-1],
                    cmdline=f"{name} --{name}",
                    container_name=f"x{name}",
                    image=f"{name}:1",
                    pod=f"{name}/y",
                    sha256=f"{i:064x}",
                    parents=(Parent(50 + i, name), Parent(1, "systemd"))[: i % 3],
                )
            ]
        )
    rows += [
        {"tgid": 0, "start_ns": 0, "uid": 0, "comm": b"", "how": how, "dir": way}
        for how, way in [
            (F.SNIFFER_HOW_FORWARDED, F.SNIFFER_DIR_FWD),
            (F.SNIFFER_HOW_NO_SOCKET, F.SNIFFER_DIR_IN),
        ]
    ]
    rows.append(
        {"comm": b"\xff\xfe\x9b", "saddr": "fe80::1", "daddr": "2001:db8::2", "hdr_len": 48}
    )
    rows.append({"flags": F.SNIFFER_F_SHARED, "cookie": 5, "comm": b"cut \xe2\x82"})
    known.restore([Process(100, 5_000_000_000, comm="client", uid=1000)])
    records = make_records(*rows)
    records["len"][-1] = 3  # less than its headers
    head = np.zeros(1, wire.BATCH)[0]
    held = {5: [{"pid": 1, "comm": "a b"}, {"pid": 2, "comm": "='x.7"}]}
    holders = lambda cookies: {one: held[one] for one in cookies if one in held}  # noqa: E731
    return NamedBatch(head, records, Clock(NOON_NS, 0)), known, holders


def save(path: Any, batch: Any, details: Any, holders: Any, first_bytes: Any = None) -> None:
    saver = open_saver(str(path), format_of(str(path), None), first_bytes)
    saver.add(columns_of_batch(batch, details, holders))
    saver.close()
    assert saver.rows == len(batch.records)


def read(*paths: Any, filter: Any = EVERYTHING, bytes: bool = False) -> Iterator[Any]:
    """Yield (batch, source) of each piece."""
    with FileSource([str(path) for path in paths], filter, bytes) as source:
        while (batches := source.read(0)) is not None:
            for batch in batches:
                yield batch, source


def rows_of(pieces: Any) -> Any:
    rows = []
    for batch, source in pieces:
        values = cells(columns_of_batch(batch, source, source.holders))
        rows += [
            dict(zip(COLUMNS, row, strict=True))
            for row in zip(*(values[name] for name in COLUMNS), strict=True)
        ]
    return rows


def figures(pieces: Any) -> tuple[Any, ...]:
    shown, summary = ShownAccount(), Summary()
    for batch, _ in pieces:
        shown.add(batch)
        summary.add(batch)
    return shown.lines(None, 0), summary.figures()


def hunt(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hunter", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_gives_back_every_column_and_the_figures_of_the_live_run(
    suffix: str, everything: tuple[Any, ...], tmp_path: Path
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    batch, known, holders = everything
    path = tmp_path / f"x{suffix}"
    save(path, batch, known, holders)
    live = cells(columns_of_batch(batch, known, holders))
    rows = rows_of(read(path))
    assert len(rows) == len(batch.records)
    wanted = [{name: live[name][i] for name in COLUMNS} for i in range(len(rows))]
    key = lambda row: (row["time"], row["pid"] or 0, row["comm"] or "", row["how"])  # noqa: E731
    assert sorted(rows, key=key) == sorted(wanted, key=key)
    assert figures(read(path)) == figures([(batch, known)])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_read_is_saved_again_as_it_was(
    suffix: str, everything: tuple[Any, ...], tmp_path: Path
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    save(first, *everything)
    done = hunt("-r", first, "-w", second)
    assert done.returncode == 0, done.stderr
    if suffix == ".parquet":
        assert rows_of(read(first)) == rows_of(read(second))
    else:
        assert first.read_bytes() == second.read_bytes()


def test_a_process_that_changes_its_name_and_program_keeps_both(tmp_path: Path) -> None:
    """One (pid, start) before and after an exec, in turn: each row has the names of its time."""
    path = tmp_path / "x.jsonl"
    details = Everything()
    saver = open_saver(str(path), "jsonl", None)
    for turn in range(6):
        comm = f"step{turn}"
        details.restore([Process(100, 5_000_000_000, comm=comm, exe=f"/bin/{comm}", uid=1000)])
        records = make_records({"comm": comm.encode(), "time_ns": turn})
        batch = NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(NOON_NS, 0))
        saver.add(columns_of_batch(batch, details))
    saver.close()
    rows = rows_of(read(path))
    assert [row["exe"] for row in rows] == [f"/bin/step{turn}" for turn in range(6)]
    assert len(figures(read(path))[1]) == 1


@settings(max_examples=500)
@given(NAMES)
def test_a_cell_gives_its_name_back_and_no_spreadsheet_computes_it(name: Any) -> None:
    shown = cell(name)
    assert uncell(shown) == name and unescaped(escaped(name)) == name
    assert plain(shown) == shown and "\n" not in shown and "\r" not in shown
    assert not shown.lstrip(" \xa0'").startswith(("=", "+", "-", "@")) or shown.startswith("'")
    for part in shown.split(";")[1:]:
        assert not part.lstrip(" '\"").startswith(("=", "+", "-", "@"))


@settings(max_examples=300)
@given(NAMES, NAMES, NAMES)
def test_no_name_in_a_comment_passes_for_another_word(comm: Any, exe: Any, unit: Any) -> None:
    row = {
        "pid": 7,
        "comm": comm,
        "uid": 5,
        "exe": exe or None,
        "unit": unit or None,
        "how": "diag",
    }
    row["holders"] = [{"pid": 8, "comm": exe}]
    back, made = read_comment(comment_of(row, made=True))
    assert made and back.pop("pid") == "7" and back.pop("uid") == "5" and back.pop("how") == "diag"
    assert back.pop("comm") == comm and back.pop("holders") == row["holders"]
    assert back == {name: row[name] for name in ("exe", "unit") if row[name]}


def test_a_comment_that_is_too_long_loses_its_last_words() -> None:
    row = {"pid": 7, "comm": "a", "uid": 5, "how": "diag", "cmdline": "\u2028" * 40_000}
    text = comment_of(row)
    assert len(text.encode()) < 65_536 and read_comment(text)[0]["uid"] == "5"


def test_unknown_is_null_in_every_format(everything: tuple[Any, ...], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    batch, known, holders = everything
    for suffix in SUFFIXES[:3]:
        save(tmp_path / f"x{suffix}", batch, known, holders)
    tables = [
        list(csv.DictReader((tmp_path / "x.csv").open(newline=""))),
        [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()],
        parquet.read_table(tmp_path / "x.parquet").to_pylist(),
    ]
    for nothing, rows in zip(("", None, None), tables, strict=True):
        (row,) = (row for row in rows if row["how"] == "forwarded")
        assert [row[name] for name in ("pid", "comm", "exe", "uid", "unit")] == [nothing] * 5


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_a_file_of_the_first_release_is_read(suffix: Any, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    row: dict[str, Any] = dict.fromkeys(FIRST_COLUMNS, "")
    row |= {"time": "2026-05-28T20:26:40.123456Z", "dir": "in", "proto": "tcp", "how": "diag"}
    row |= {"src": "::1", "dst": "::2", "sport": 1, "dport": 2, "len": 60, "netns": 9}
    row |= {"pid": 5, "uid": 0, "comm": "'quoted", "exe": "/bin/x"}
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIRST_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)
    elif suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist([row]), path)
    (one,) = rows_of(read(path))
    assert one["comm"] == "'quoted" and one["exe"] == "/bin/x" and one["tcp_flags"] is None
    done = hunt("-n", "-r", path)
    assert "len 60 'quoted.5\n" in done.stdout and "[" not in done.stdout, done.stderr


def test_several_files_are_one_in_order_of_time(tmp_path: Path) -> None:
    for number, times in enumerate([(5, 6, 9), (1, 7), (2, 3, 8)]):
        records = make_records(*({"time_ns": time * 10**6, "tgid": number + 1} for time in times))
        batch = NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(NOON_NS, 0))
        save(tmp_path / f"{number}{SUFFIXES[number]}", batch, Processes(), lambda cookies: {})
    paths = sorted(tmp_path.iterdir())
    rows = rows_of(read(*paths))
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert len(rows) == 8
    arguments = itertools.chain.from_iterable(("-r", path) for path in paths)
    done = hunt("--json", *arguments)
    assert [json.loads(line)["time"] for line in done.stdout.splitlines()] == sorted(
        row["time"] for row in rows
    )
    assert hunt("report", *paths, "-o", tmp_path / "x.html").returncode == 0


def _count(path: Any, suffix: Any) -> Any:
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        return parquet.read_table(path).num_rows
    return len(rows_of(read(path)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_moved_away_gets_a_successor(suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path, moved = tmp_path / f"x{suffix}", tmp_path / f"old{suffix}"
    saver = open_saver(str(path), suffix[1:], None)
    records = make_records({}, {})
    batch = NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(NOON_NS, 0))
    table = columns_of_batch(batch, Everything(), lambda _: {})
    saver.add(table)
    saver.reopen()  # it is still there: nothing is lost
    saver.add(table)
    path.rename(moved)
    saver.add(table)
    saver.reopen()
    saver.add(table)
    saver.close()
    assert saver.rows == 8
    assert (_count(moved, suffix), _count(path, suffix)) == (6, 2)
    assert path.stat().st_mode & 0o777 == 0o600


def test_sigusr2_asks_for_a_new_file_once_and_does_not_end_anything() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.takes_reopen() and not stop.takes_reopen()
        assert not stop
