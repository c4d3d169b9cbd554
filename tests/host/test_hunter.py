# SPDX-License-Identifier: MIT
"""The hunter as its users run it: a program of its own, real traffic, engine packet (root)."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hunter.show.columns import COLUMNS
from hunting import (
    DAEMON,
    HUNTER,
    account_of,
    begun,
    echo,
    hunt,
    hunt_as_nobody,
    owners,
    talk,
    traffic,
)
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    log = open(path.with_suffix(".log"), "w+")
    process = subprocess.Popen(
        [*DAEMON, "--engine", "packet", "--socket", str(path), "--foreground"], stderr=log
    )

    def serves() -> Any:
        assert process.poll() is None, path.with_suffix(".log").read_text()
        return path.exists()

    until(serves)
    yield str(path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(patient(20)) == 0
    log.close()


def test_alone_it_names_both_ends_and_its_account_closes(
    server: tuple[int, int], no_daemon: list[str]
) -> None:
    pid, port = server
    done = hunt(*no_daemon, "-n", "tcp", "port", port, *talk(port))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    to_server = [line for line in lines if " in  tcp 127.0.0.1." in line and f".{port} len" in line]
    assert len(to_server) >= 5
    assert all(re.search(rf" \S+\.{pid}\b", line) for line in to_server)
    account = account_of(done.stderr)
    assert account["shown"] == len(lines) and account["seen"] >= account["shown"]
    assert account["lost"] == 0


@pytest.mark.parametrize("way", ["alone", "daemon"])
def test_without_a_filter_all_that_was_delivered_is_shown(
    way: str, server: tuple[int, int], daemon: str, no_daemon: list[str], tmp_path: Path
) -> None:
    """The last packets of the command too, though the hunter ends with it."""
    _, port = server
    path = tmp_path / "x.jsonl"
    source = no_daemon if way == "alone" else ["--socket", daemon]
    done = hunt(*source, "--save", path, *talk(port))
    account = account_of(done.stderr)
    assert account["shown"] == account["delivered"] == len(path.read_text().splitlines())
    assert account["shown"] > 20


@pytest.mark.parametrize("way", ["daemon", "direct"])
def test_through_the_daemon_and_directly_it_names_both_ends(
    way: str, server: tuple[int, int], daemon: str, tmp_path: Path
) -> None:
    pid, port = server
    path = tmp_path / "x.jsonl"
    extra = ["--direct", "--engine", "packet"] if way == "direct" else []
    done = hunt("--socket", daemon, *extra, "--save", path, "port", port, *talk(port, 20))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 80
    by_server, by_client = owners(rows, port)
    assert by_server == {pid}
    clients = by_client - {None}
    assert len(clients) == 1 and clients != {pid}
    assert {row["comm"] for row in rows if row["pid"]} <= {"python", "python3", "python3.11"} | {
        os.path.basename(sys.executable)
    }
    assert account_of(done.stderr)["shown"] == len(rows)


def test_without_root_it_works_through_the_daemon_and_shows_own_packets_only(
    server: tuple[int, int], daemon: str
) -> None:
    _, port = server
    os.chmod(os.path.dirname(daemon), 0o755)
    done = hunt_as_nobody("--socket", daemon, "-n", "port", port, "--duration", "1")
    assert done.returncode == 0, done.stderr
    assert "packets of your own processes" in done.stderr
    assert done.stdout == ""


def test_csv_has_the_agreed_columns_and_true_values(
    server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    pid, port = server
    path = tmp_path / "capture.csv"
    before = time.time()
    done = hunt(*no_daemon, "--save", path, "port", port, *talk(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with open(path, newline="") as file:
        assert file.readline() == ",".join(COLUMNS) + "\n"
        rows = list(csv.DictReader(file, COLUMNS))
    incoming = [row for row in rows if row["dir"] == "in" and row["dport"] == str(port)]
    assert {row["pid"] for row in incoming} == {str(pid)}
    assert {row["exe"] for row in incoming} == {os.path.realpath(f"/proc/{pid}/exe")}
    assert {(row["proto"], row["src"], row["dst"], row["uid"]) for row in rows} == {
        ("tcp", "127.0.0.1", "127.0.0.1", "0")
    }
    assert {row["netns"] for row in rows} == {str(os.stat("/proc/self/ns/net").st_ino)}
    assert 152 in [int(row["len"]) for row in rows]  # 20 IP + 32 TCP with timestamps + 100
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert all(re.fullmatch(stamp, row["time"]) for row in rows)
    first = time.strptime(rows[0]["time"][:19], "%Y-%m-%dT%H:%M:%S")
    import calendar

    assert int(before) <= calendar.timegm(first) <= time.time()
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_saved_file_shows_the_same_through_r_and_filters(
    server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    pid, port = server
    for name in ("x.csv", "x.jsonl"):
        path = tmp_path / name
        done = hunt(*no_daemon, "--save", path, "port", port, *talk(port))
        assert done.returncode == 0, done.stderr
        shown = account_of(done.stderr)["shown"]
        again = hunt("-r", path, "--json")
        assert again.returncode == 0, again.stderr
        rows = [json.loads(line) for line in again.stdout.splitlines()]
        assert len(rows) == shown
        if name == "x.jsonl":
            assert rows == [json.loads(line) for line in path.read_text().splitlines()]
        some = hunt("-r", path, "--json", "dst", "port", port, "and", "pid", pid)
        chosen = [json.loads(line) for line in some.stdout.splitlines()]
        assert chosen == [row for row in rows if row["dport"] == port and row["pid"] == pid]
        assert 0 < len(chosen) < len(rows)


def test_options_narrow_as_the_filter_does(server: tuple[int, int], no_daemon: list[str]) -> None:
    pid, port = server
    with traffic(port):
        cases: list[tuple[list[object], Callable[[dict[str, Any]], bool]]] = [
            (["--pid", pid], lambda row: row["pid"] == pid),
            (["-Q", "in"], lambda row: row["dir"] == "in"),
            (["-Q", "out", "dst", "port", port], lambda row: row["dport"] == port),
            (["-i", "lo"], lambda row: row["src"] == row["dst"] == "127.0.0.1"),
            (["--uid", "root"], lambda row: row["uid"] == 0),
            (["--pid", os.getpid(), "--pid", pid], lambda row: row["pid"] in (pid, os.getpid())),
        ]
        for options, fits in cases:
            done = hunt(*no_daemon, "--json", "-c", "10", *options)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            assert len(rows) == 10 and all(map(fits, rows)), (options, rows[:3], done.stderr)


def test_a_filter_file_is_read_with_comments(
    server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    _, port = server
    path = tmp_path / "filter"
    path.write_text(f"# what I care for\ntcp and\nport {port}\n")
    with traffic(port):
        done = hunt(*no_daemon, "-F", path, "--json", "-c", "3")
    assert all(
        port in (row["sport"], row["dport"]) for row in map(json.loads, done.stdout.splitlines())
    )


HOSTILE = [b"\x1b[2Jx", b"a\nb,c", b"[/red]", b"=cmd()", b"<script>", b"\xff\xfe", b'",""']

RENAMED = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]), 0, 0, 0)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    while data := peer.recv(100):
        peer.sendall(data)
"""


@pytest.mark.parametrize("name", HOSTILE, ids=[repr(name) for name in HOSTILE])
@pytest.mark.parametrize("output", ["lines", "json", "csv"])
def test_a_hostile_process_name_is_harmless(name: bytes, output: str, no_daemon: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RENAMED, name.hex()], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(there(process.stdout).readline())
        options = {"lines": ["-n", "-vv"], "json": ["--json"], "csv": ["--save", "-"]}[output]
        with traffic(port):
            done = hunt(*no_daemon, *options, "-c", "8", "port", port)
    finally:
        process.kill()
        process.communicate()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 8 + (output == "csv")
    assert done.stdout.replace("\n", "").isprintable()
    if output == "csv":
        cells = [row[COLUMNS.index("comm")] for row in csv.reader(lines[1:])]
        assert all(len(row) == len(COLUMNS) for row in csv.reader(lines))
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    if output == "json":
        wanted = name.decode("utf-8", "backslashreplace")
        assert wanted in {json.loads(line)["comm"] for line in lines}


def ask_who(path: Any, port: int, *words: Any) -> Any:
    return hunt("who", "--socket", path, "--port", port, "--json", *words)


def test_who_names_the_listener_with_and_without_the_daemon(
    server: tuple[int, int], daemon: str
) -> None:
    pid, port = server
    with traffic(port):
        until(lambda: json.loads(ask_who(daemon, port).stdout)["flows"])
        for place in (["--socket", daemon], []):

            def listening(place: Any = place) -> list[Any]:
                done = hunt("who", *place, "--port", port, "--json")
                assert done.returncode == 0, done.stderr
                owners = json.loads(done.stdout)["owners"]
                return [one["pid"] for one in owners if one["listening"] and one["port"] == port]

            assert until(listening) == [pid]  # the daemon looks twice a second
            people = hunt("who", *place, "--port", port)
            assert f"listens on tcp 127.0.0.1.{port}" in people.stdout
            assert f".{pid} " in people.stdout


def test_who_remembers_a_flow_that_is_over(daemon: str) -> None:
    with echo() as (pid, port), traffic(port):
        until(lambda: json.loads(ask_who(daemon, port).stdout)["flows"])
    until(lambda: not json.loads(ask_who(daemon, port).stdout)["owners"])
    flows = json.loads(ask_who(daemon, port, "--since", "1m").stdout)["flows"]
    assert {(flow["pid"], flow["lport"]) for flow in flows if flow["lport"] == port} == {
        (pid, port)
    }


def test_stats_for_machines_and_people(daemon: str) -> None:
    figures = json.loads(hunt("stats", "--socket", daemon, "--json").stdout)
    account = figures["account"]
    lost = sum(account["lost"].values())
    assert account["records"] == account["delivered"] + lost + account["waiting"]
    people = hunt("stats", "--socket", daemon).stdout
    assert "packets seen" in people and "engine packet" in people


def _start_daemon(path: Any) -> Any:
    process = subprocess.Popen(
        [*DAEMON, "--engine", "packet", "--socket", str(path), "--foreground"],
        stderr=subprocess.DEVNULL,
    )

    def serves() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return True
        return False

    until(serves)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_waits_for_a_daemon_that_goes_away_and_goes_on_with_the_next(
    number: int, server: tuple[int, int], tmp_path: Path
) -> None:
    path, saved = tmp_path / "d.sock", tmp_path / "out.csv"
    first = _start_daemon(path)
    second = None
    command = [*HUNTER, "--socket", str(path), "-n", "--save", str(saved), f"port {server[1]}"]
    hunter = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        begun(hunter)
        with traffic(server[1]):
            until(lambda: saved.read_text().count("\n") > 1)
            first.send_signal(number)
            first.wait(patient(20))
            assert "waiting for it to come back" in there(hunter.stderr).readline()
            second = _start_daemon(path)
            assert "the daemon is back after" in there(hunter.stderr).readline()
            before = len(saved.read_text().splitlines())
            until(lambda: len(saved.read_text().splitlines()) > before)
        hunter.send_signal(signal.SIGINT)
        _, err = hunter.communicate(timeout=patient(30))
    finally:
        for process in (hunter, first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    assert hunter.returncode == 0
    # engine packet starts anew with its daemon: nobody counted what passed between
    assert re.search(r"no daemon for \d+\.\d s: what passed then is lost, not counted", err)
    account = account_of(err)
    with saved.open() as file:
        assert account["shown"] == len(list(csv.DictReader(file)))
    assert account["delivered"] >= account["shown"] > 0
