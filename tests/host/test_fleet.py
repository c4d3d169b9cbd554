# SPDX-License-Identifier: MIT
"""From a daemon's packets to a row of Parquet, over a real server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import Daemon, StartDaemon
from fleeting import Program, Server, free_port, rows
from hunting import NOBODY
from places import open_to_all
from receiving import receiver
from waiting import patient, until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


@pytest.fixture(name="nats")
def _nats(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "nats") as server:
        yield server


def test_a_connection_becomes_a_row_that_names_its_process(
    daemon: Daemon, nats: Server, tmp_path: Path, server: tuple[int, int]
) -> None:
    store = tmp_path / "store"
    arguments = ["--server", nats.url, "--interval", "0.3"]
    with (
        Program.of(tmp_path / "collect.log", "collect", str(store), *arguments) as collector,
        Program.of(
            tmp_path / "export.log",
            "export",
            *("--socket", daemon.path, "--spool", str(tmp_path / "spool")),
            *("--host", "web1.example", *arguments),
        ) as exporter,
    ):
        exporter.wait_for("engine packet")
        with socket.create_connection(("127.0.0.1", server[1])) as client:
            port = client.getsockname()[1]
            client.sendall(b"x" * 1000)
            client.recv(1000)

            def found() -> list[Any]:
                return [row for row in rows(store, "flows") if row["lport"] == port]

            until(found, 30, "the row")
        assert exporter.stop() == 0, exporter.text()
        until(lambda: any(row["spooled"] == 0 for row in rows(store, "account")[-1:]))
        assert collector.stop() == 0, collector.text()
    flows = found()
    assert {row["host"] for row in flows} == {"web1.example"}
    assert {row["tgid"] for row in flows} == {os.getpid()}
    assert {(row["laddr"], row["raddr"]) for row in flows} == {("127.0.0.1", "127.0.0.1")}
    assert sum(row["bytes_out"] for row in flows) > 1000
    assert {row["initiated"] for row in flows} == {True}
    others = [row for row in rows(store, "flows") if row["rport"] == port]
    told = {(row["tgid"], row["initiated"]) for row in others}
    # beside other work engine packet may be too late for some of its packets
    assert (server[0], False) in told and told <= {(server[0], False), (0, None), (0, False)}
    process = next(row for row in rows(store, "procs") if row["tgid"] == os.getpid())
    assert process["start_ns"] == flows[0]["start_ns"]
    assert process["exe"] and process["name"].startswith("python")
    assert process["cmdline"] == _program()
    last = max(rows(store, "account"), key=lambda row: row["at_ns"])
    assert last["exported"] == last["acknowledged"] + last["spooled"] + last["lost"]
    assert last["exported"] == len(rows(store, "flows"))
    assert last["delivered"] > 0 and last["engine"] == "packet"


def test_a_connection_becomes_a_log_record_of_a_pipeline(
    daemon: Daemon, tmp_path: Path, server: tuple[int, int]
) -> None:
    """The daemon's own packets at a receiver of OpenTelemetry logs, by both conventions' names."""
    with (
        receiver() as stub,
        Program.of(
            tmp_path / "otlp.log",
            "otlp",
            *("--socket", daemon.path, "--endpoint", stub.url, "--host", "web1.example"),
            *("--interval", "0.5"),
        ) as program,
    ):
        program.wait_for("engine packet")
        with socket.create_connection(("127.0.0.1", server[1])) as client:
            port = str(client.getsockname()[1])
            client.sendall(b"x" * 1000)
            client.recv(1000)

            def found() -> list[Any]:
                told = [_attributes(one) for one in list(stub.taken)]
                return [one for one in told if port == one["source.port"] and "process.pid" in one]

            until(lambda: {one["process.pid"] for one in found()} >= {str(os.getpid())}, 30)
        assert program.stop() == 0, program.text()
        [last] = [line for line in program.text().splitlines() if "refused" in line]
        assert f"{len(stub.taken)} sent, 0 refused, 0 lost" in last
    ours = [one for one in found() if one["process.pid"] == str(os.getpid())]
    [one, *_] = [one for one in ours if one["network.direction"] == "egress"]
    assert one["network.transport"] == "tcp" and one["network.type"] == "ipv4"
    assert one["source.address"] == one["destination.address"] == "127.0.0.1"
    assert one["destination.port"] == str(server[1])
    assert one["process.executable.path"] == os.readlink("/proc/self/exe")
    assert one["process.command_line"] == _program()
    assert one["network.community_id"].startswith("1:")
    assert sum(int(one["source.bytes"]) for one in ours) > 1000


def _program() -> str:
    """What the daemon tells of a command line unless it is configured: its first word."""
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    assert len(words) > 2
    return words[0].decode()


def _attributes(record: Any) -> dict[Any, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in record["attributes"]}


def test_a_member_of_the_daemon_s_group_exports_all_and_has_no_other_right(
    start: StartDaemon, nats: Server, tmp_path: Path, server: tuple[int, int]
) -> None:
    daemon = start(config="group: nogroup\n")
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    os.chown(spool, 65534, 65534)
    open_to_all(tmp_path)
    open_to_all(Path(daemon.path).parent)
    command = [*NOBODY, sys.executable, *("-I", "-m", "fleet.export", "--socket", daemon.path)]
    command += ["--spool", str(spool), "--server", nats.url, "--interval", "0.3"]
    words = ("collect", str(store), "--server", nats.url, "--interval", "0.3")
    with (
        Program.of(tmp_path / "collect.log", *words),
        Program(tmp_path / "export.log", command) as exporter,
    ):
        exporter.wait_for("engine packet")
        with socket.create_connection(("127.0.0.1", server[1])) as client:
            port = client.getsockname()[1]
            client.sendall(b"x")
            client.recv(10)

            def found() -> set[int]:
                return {row["tgid"] for row in rows(store, "flows") if row["lport"] == port}

            until(lambda: os.getpid() in found(), 30, "the row")
        status = Path(f"/proc/{exporter.process.pid}/status").read_text()
        uids = status.partition("Uid:")[2].split()[:4]
        assert uids == ["65534"] * 4
        assert exporter.stop() == 0, exporter.text()


def test_who_may_not_see_everything_is_told_so(
    daemon: Daemon, nats: Server, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    os.chown(spool, 65534, 65534)
    open_to_all(tmp_path)
    command = [*NOBODY, sys.executable, *("-I", "-m", "fleet.export", "--socket", daemon.path)]
    command += ["--spool", str(spool), "--server", nats.url]
    with Program(tmp_path / "export.log", command) as exporter:
        assert exporter.process.wait(patient(30)) == 1
        assert "member of its group" in exporter.text()


def test_one_command_starts_a_fleet_on_one_machine_and_ends_it(
    tmp_path: Path, server: tuple[int, int]
) -> None:
    directory = tmp_path / "fleet"
    told = {"PACKET_HUNTER_ENGINE": "packet", "PACKET_HUNTER_NATS_PORT": str(free_port())}
    # a shell cannot trap what was ignored when it began, as it is in a job in the background
    command = ["env", "--default-signal=INT", str(EXAMPLES / "fleet.sh"), str(directory)]
    with Program(
        tmp_path / "log", command, env=os.environ | told, start_new_session=True
    ) as example:
        example.wait_for("packet-hunter fleet who")
        until(lambda: "connected as" in (directory / "export.log").read_text(), 60)
        with socket.create_connection(("127.0.0.1", server[1])) as client:
            port = client.getsockname()[1]

            def found() -> list[Any]:
                client.sendall(b"x")
                client.recv(10)
                return [row for row in rows(directory / "hours", "flows") if row["lport"] == port]

            until(found, 60, "a row")
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        parts = [pid for pid in pids if _session(pid) == example.process.pid]
        assert len(parts) >= 5
        # every user of the machine can connect
        with socket.create_connection(("127.0.0.1", int(told["PACKET_HUNTER_NATS_PORT"]))) as one:
            one.sendall(b'CONNECT {"verbose":false}\r\nSUB > 1\r\nPING\r\n')
            one.settimeout(patient(30))
            answer = b"".join(iter(lambda: one.recv(1 << 16), b""))
            assert b"Authorization Violation" in answer and b"PONG" not in answer
        example.process.send_signal(signal.SIGINT)
        assert example.process.wait(patient(60)) == 0, example.text()
        until(lambda: not any(_session(pid) == example.process.pid for pid in parts))


@pytest.mark.parametrize("whose", ["another user's", "all users'"])
def test_no_fleet_begins_in_a_directory_where_others_can_put_links(
    whose: str, tmp_path: Path
) -> None:
    directory, victim = tmp_path / "fleet", tmp_path / "victim"
    victim.write_text("kept")
    directory.mkdir()
    (directory / "nats.conf").symlink_to(victim)
    if whose == "all users'":
        directory.chmod(0o1777)
    else:
        os.chown(directory, 65534, 65534)
    command = ["timeout", "-s", "INT", "20", str(EXAMPLES / "fleet.sh"), str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patient(60))
    told = "others can write there" if whose == "all users'" else "not yours"
    assert ended.returncode == 1 and told in ended.stderr
    assert victim.read_text() == "kept"


def _session(pid: int) -> Any:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
