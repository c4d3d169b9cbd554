# SPDX-License-Identifier: MIT
"""Files that are damaged, hostile, cut or not ours: one line that says where, and what was good."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from damage import CHANGES, PORTS, TCP, UDP, changed, ipv4
from hunter.formats import pcapng
from hunter.formats.captures import read_capture
from hunter.formats.inputs import Input
from hunter.show.columns import FIRST_COLUMNS
from hunter.sources.source_file import FileSource
from nlproto import Error
from nlproto.filters.filter import EVERYTHING

SUFFIXES = (".csv", ".jsonl", ".parquet", ".pcapng")


def hunt(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hunter", *map(str, arguments)],
        capture_output=True,
        timeout=120,
        **options,
    )


def row(**values: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "time": "2026-05-28T20:26:40.123456Z",
        "dir": "in",
        "proto": "tcp",
        "how": "diag",
    }
    known |= {"src": "10.0.0.1", "dst": "10.0.0.2", "sport": 1, "dport": 2, "len": 60, "netns": 9}
    return known | {"pid": 5, "uid": 0, "comm": "curl", "exe": "/bin/curl"} | values


def write_csv(path: Any, rows: Any, columns: Any = FIRST_COLUMNS) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Any, rows: Any) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def drain(path: Any) -> tuple[Any, ...]:
    """(packets that were read, the Error that ended it or None)."""
    count = 0
    try:
        with FileSource([str(path)], EVERYTHING) as source:
            while (batches := source.read(0)) is not None:
                count += sum(len(batch.records) for batch in batches)
    except Error as error:
        assert "\n" not in str(error)
        return count, str(error)
    return count, None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, bytes]:
    """A saved capture in each format, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    rows = [row(sport=i + 1, comm=name) for i, name in enumerate(["curl", "a b", "'=x", "日本"])]
    write_csv(folder / "x.csv", rows)
    assert hunt("-r", folder / "x.csv", "-w", folder / "x.jsonl").returncode == 0
    hunt("-r", folder / "x.csv", "-w", folder / "x.parquet")
    section = pcapng.section_header("packet-hunter")
    interface = pcapng.interface_description("lo", description="netns 9 ifindex 1")
    packet = ipv4(TCP) + struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 80, 18, 0, 0, 0)
    comment = 'packet-hunter: "a b.5" uid=0 exe=/bin/x how=diag flags=dead hdr_len=40 start_ns=7'
    block = pcapng.enhanced_packet(0, 10**18, packet, 40, comment, 1)
    (folder / "x.pcapng").write_bytes(section + interface + block * 4)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_nothing_but_an_error_comes_out_of_a_damaged_capture(
    suffix: str, good: dict[Any, bytes], tmp_path: Path, changes: Any
) -> None:
    if suffix not in good:
        pytest.skip("pyarrow is not installed")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(changed(good[suffix], changes))
    drain(path)


BAD = {
    "short": ("x,y", "line 4 has 2 fields"),
    "nul": ("\0" * 200_000, "line 4"),
    "long field": ("a" * 200_000, "field larger than field limit"),
    "long line": ("a" * 1_100_000, "line 4 is longer than"),
    "quote": ('2026,"in', "line 4"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_of_csv_is_named_and_those_before_it_are_read(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, [row(), row(), row()])
    lines = path.read_text().splitlines(keepends=True)
    line, words = BAD[bad]
    path.write_text("".join([*lines[:3], line + "\n", lines[3]]))
    count, error = drain(path)
    assert count == 2 and f"{path}, line 4" in error and words in error
    done = hunt("-r", path, "--json")
    assert done.returncode == 1 and done.stdout.count(b"\n") == 2
    assert done.stderr.count(b"line 4") == 1 and b"Traceback" not in done.stderr
    done = hunt("report", path, "-o", tmp_path / "x.html")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"2 packets" in (tmp_path / "x.html").read_bytes()


VALUES: dict[str, list[Any]] = {
    "time": ["", "yesterday", "1969-12-31T23:59:59Z", "9999-12-31T23:59:59Z", 5, None, "2026-05"],
    "dir": ["up", "", None, [], {}],
    "proto": ["icmp", 6],
    "dst": ["::1"],
    "src": ["", "10.0.0.256", "localhost", 5, [], "1" * 10_000],
    "sport": ["", -1, 65536, 1.5, True, "١", "0x1", "1e3", 10**30, [], "9" * 100_000],
    "len": [1 << 32, "-0"],
    "pid": [0, -1, 1 << 32, "x", 1.0, True, None, ""],
    "uid": [None, "root", 1 << 32],
    "comm": [5, ["a"], {"a": 1}, True, "x" * 5000],
    "exe": [5, [], "x" * 5000],
    "netns": [None, "x"],
    "how": ["", "magic", 9, None],
    "flags": ["alive", 5],
    "tcp_flags": ["Q", "SS", 2],
    "segments": [65536, "x"],
    "start_ns": [1 << 64],
    "holders": [
        5,
        "x",
        [5],
        [{}],
        [{"pid": "1", "comm": "x"}],
        {"pid": 1},
        [{"pid": 1, "comm": "x" * 5000}],
    ],
    "unit": [5],
    "cmdline": [[]],
    "interface": [5],
}


@pytest.mark.parametrize(
    ("column", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
def test_a_value_that_cannot_be_is_named_with_its_line(
    column: Any, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    write_json(path, [row(), row(), row(**{column: value}), row()])
    count, error = drain(path)
    if (column, value) == ("time", "2026-05"):  # Python 3.11 takes it for the first of May
        return
    assert count == 2 and error.startswith(f"{path}, line 3: ") and column in error
    assert len(error) < len(str(path)) + 100


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[]", "no JSON object"),
        (b"5", "no JSON object"),
        (b'"\xff"', "no UTF-8"),
        (b"{}", "it has no sport"),
        (b"", "no JSON"),
        (b'{"time": ', "no JSON"),
        (b"\0" * 4096, "no JSON"),
        (b'{"sport": ' + b"9" * 10_000 + b"}", "no JSON"),
    ],
)
def test_a_bad_line_of_json_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_json(path, [row()])
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    count, error = drain(path)
    assert count == 1 and f"{path}, line 2" in error and words in error


def test_a_cut_file_is_read_to_its_last_whole_row_and_says_so(
    good: dict[Any, bytes], tmp_path: Path
) -> None:
    for suffix in (".csv", ".jsonl", ".pcapng"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(good[suffix][:-3])
        count, error = drain(path)
        assert count == 3 and "ends in the middle of" in error
        done = hunt("-r", path, "--json")
        assert done.returncode == 1 and done.stdout.count(b"\n") == 3
        assert b"3 shown = 3 named" in done.stderr


def test_one_damaged_file_of_several_does_not_hide_the_others(
    good: dict[Any, bytes], tmp_path: Path
) -> None:
    for suffix in (".csv", ".jsonl"):
        (tmp_path / f"x{suffix}").write_bytes(good[suffix])
    (tmp_path / "cut.csv").write_bytes(good[".csv"][:-3])
    files = [part for path in sorted(tmp_path.iterdir()) for part in ("-r", path)]
    done = hunt(*files, "--json")
    assert done.returncode == 1 and done.stdout.count(b"\n") == 4 + 4 + 3
    assert done.stderr.count(b"ends in the middle of line 5") == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_whatever_is_in_it(
    suffix: str, packed: bool, good: dict[Any, bytes], tmp_path: Path
) -> None:
    if suffix not in good:
        pytest.skip("pyarrow is not installed")
    data = gzip.compress(good[suffix]) if packed else good[suffix]
    (tmp_path / "x").write_bytes(data)
    done = hunt("--json", "-r", "/dev/stdin" if packed else "-", input=data)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 4, done.stderr
    assert drain(tmp_path / "x") == (4, None)
    if packed:
        assert hunt("report", "-", "-o", tmp_path / "x.html", input=data).returncode == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"no capture\n", "no capture of packet-hunter"),
        (b"time,to,go\n1,2,3\n", "does not name the columns"),
        (b"PK\x03\x04" + bytes(50), "unzip -p"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1), "annotate"),
        (
            pcapng.section_header("tcpdump")
            + pcapng.interface_description("lo")
            + pcapng.enhanced_packet(0, 1, ipv4(UDP) + PORTS, 28),
            "annotate",
        ),
        (b"PAR1" + bytes(50), "cannot be read"),
        (b"\x1f\x8b" + bytes(50), "compressed data"),
    ],
)
def test_what_is_no_saved_capture_is_refused_before_anything_is_shown(
    data: Any, words: str, tmp_path: Path
) -> None:
    if words == "cannot be read":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "x.dat"
    path.write_bytes(data)
    for arguments in (["-r", path], ["report", path, "-o", tmp_path / "x.html"]):
        done = hunt(*arguments)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.count(b"\n") == 1 and words in done.stderr.decode()
    for path in (tmp_path / "none.csv", tmp_path):
        done = hunt("-r", path)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1


def test_the_input_is_not_written_over(good: dict[Any, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(good[".csv"])
    (tmp_path / "link.csv").symlink_to(path)
    for arguments in (
        ["-r", path, "-w", path],
        ["-r", path, "-w", tmp_path / "link.csv"],
        ["report", path, "-o", path],
    ):
        done = hunt(*arguments)
        assert done.returncode == 2 and b"the capture itself" in done.stderr
        assert path.read_bytes() == good[".csv"]


def test_packets_are_not_invented_from_rows(good: dict[Any, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(good[".csv"])
    done = hunt("-r", tmp_path / "x.csv", "-w", tmp_path / "x.pcapng")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"no bytes of packets" in done.stderr and not (tmp_path / "x.pcapng").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_in_the_account(suffix: str, good: dict[Any, bytes], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    source, path = tmp_path / "in.pcapng", tmp_path / f"x{suffix}"
    blocks = [block.data for block in read_capture(io.BytesIO(good[".pcapng"]), "x")]
    source.write_bytes(b"".join(blocks[:2]) + blocks[2] * 20_000)
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    limit = 1_500 if suffix == ".parquet" else 1_000_001
    done = hunt(
        *("-r", source, "-w", path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    told = done.stderr.decode()
    assert done.returncode == 1 and "File too large" in told, told
    saved = 0 if suffix == ".parquet" else drain(path)[0]
    assert suffix == ".parquet" or 0 < saved < 20_000 and drain(path)[1] is None
    total = int(told.split(" to be saved = ")[0].rpartition(" ")[2])
    assert f"{total - saved} of {total} to be saved are not in {path}" in told, told


def test_a_full_output_is_in_the_account(good: dict[Any, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(good[".csv"])
    for words in (["--json"], ["-n"], ["-w", "-"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "hunter", "-r", tmp_path / "x.csv", *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 1 and "No space left" in done.stderr
        assert words == ["-w", "-"] or "4 of 4 shown are not in standard output" in done.stderr


def test_half_a_surrogate_pair_is_text_in_every_format(tmp_path: Path) -> None:
    odd = "\ud800;=1"
    path = tmp_path / "x.jsonl"
    held = [{"pid": 5, "comm": odd}]
    write_json(path, [row(comm=odd[:3], exe=odd, unit=odd, interface=odd, holders=held)])
    for suffix in SUFFIXES[:3]:
        done = hunt("-r", path, "-w", tmp_path / f"y{suffix}")
        assert done.returncode == 0 or b"needs pyarrow" in done.stderr, done.stderr
    assert b";=" not in (tmp_path / "y.csv").read_bytes()
    assert hunt("-r", path, "-vv", "--summary", "--print").returncode == 0
    assert hunt("report", path, "-o", tmp_path / "x.html").returncode == 0


def closed(*numbers: Any) -> Callable[..., Any]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def test_words_never_go_where_data_goes(good: dict[Any, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(good[".csv"])
    for words in (
        ["--json"],
        ["-w", "-"],
        ["--summary", "--json"],
        ["--nonsense"],
        ["tcp", "prot"],
    ):
        done = hunt("-r", path, *words, preexec_fn=closed(2))
        assert not [line for line in done.stdout.splitlines() if line[:1] not in b"{2t"]
        assert done.stdout.count(b"packet-hunter") == 0


def test_a_closed_output_is_one_line_and_no_file_takes_its_place(
    good: dict[Any, bytes], tmp_path: Path
) -> None:
    path, saved = tmp_path / "x.csv", tmp_path / "y.csv"
    path.write_bytes(good[".csv"])
    for words in (["-n"], ["--json"], ["-w", "-"]):
        done = hunt("-r", path, *words, preexec_fn=closed(0, 1))
        assert done.returncode == 1 and b"Traceback" not in done.stderr
        assert done.stderr.count(b"Bad file descriptor") == 1
    done = hunt("-r", path, "-w", saved, preexec_fn=closed(0, 1, 2))
    assert done.returncode == 0 and drain(saved) == (4, None)
    done = hunt("-r", "-", preexec_fn=closed(0))
    assert done.returncode == 1 and b"standard input is empty" in done.stderr


def test_an_input_that_fails_is_an_error() -> None:
    with pytest.raises(Error, match="cannot read /proc/self/mem to its end: Input/output error"):
        Input("/proc/self/mem")
