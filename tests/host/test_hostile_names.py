# SPDX-License-Identifier: MIT
"""What users may call things, with the real kernel: no name ends anything or passes for another."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import StartDaemon
from nlproto.client.client import DaemonClient
from nlproto.host import procfs
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups and captures")

ID = "4f1c0d2e9a3b" + "0" * 52
USER = 60000 + os.getpid() % 5000
SEPARATORS = [
    "\r",
    "\v",
    "\f",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x85",
    "\u2028",
    "\u2029",
    ":",
    " ",
    "\x1b[",
]

TALK = """
import os, socket, sys, time
{name}
os.setgroups([])
os.setgid({user})
os.setuid({user})
sys.stdin.readline()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    while True:
        sender.sendto(b"x", ("127.0.0.1", int(sys.argv[1])))
        time.sleep(0.02)
"""


def cgroup2() -> Path | None:
    for mount in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        if os.path.exists(f"{mount}/cgroup.controllers") and os.access(mount, os.W_OK):
            return Path(mount)
    return None


@pytest.fixture(name="tree")
def _tree() -> Iterator[Any]:
    """A slice of this run's own, in which a user's manager has a subtree."""
    mount = cgroup2()
    if mount is None:
        pytest.skip("no cgroup v2 that can be written")
    top = mount / f"phtest{os.getpid()}.slice"
    manager = top / f"user@{USER}.service"
    manager.mkdir(parents=True)
    os.chown(manager, USER, USER)
    yield top
    for path in sorted([p for p in top.rglob("*") if p.is_dir()] + [top], reverse=True):
        deadline = time.monotonic() + 30
        while path.exists():
            with contextlib.suppress(OSError):
                path.rmdir()
            assert time.monotonic() < deadline, path


@pytest.fixture(name="receiver")
def _receiver() -> Iterator[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(30)
        yield receiver


@contextlib.contextmanager
def talker(
    receiver: socket.socket, cgroup: Path, maker: int = USER, name: str = ""
) -> Iterator[Any]:
    """A process of USER that sends from `cgroup`, which `maker` makes."""
    rename = f"open('/proc/self/comm', 'wb').write({os.fsencode(name)!r})" if name else ""
    code = TALK.format(name=rename, user=USER)
    command = [sys.executable, "-c", code, str(receiver.getsockname()[1])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        parent = os.fork()
        if parent == 0:
            with contextlib.suppress(BaseException):
                os.setegid(maker)
                os.seteuid(maker)
                cgroup.mkdir(parents=True, exist_ok=True)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(parent, 0)[1] == 0
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        until(lambda: there(procfs.owner(process.pid)).uid == USER)
        there(process.stdin).write(b"\n")
        there(process.stdin).flush()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_no_name_of_a_cgroup_stops_the_daemon(
    start: StartDaemon, receiver: socket.socket, tree: Any
) -> None:  # noqa: F811
    daemon = start()
    manager = tree / f"user@{USER}.service"
    name = "a" + "".join(SEPARATORS) + "b"
    paths = [manager / f"a{mark}b" for mark in SEPARATORS] + [manager / name]
    pids = []
    for path in paths:
        with talker(receiver, path) as pid, DaemonClient(daemon.path) as client:
            pids.append(pid)
            # a look during its fork sees it in the cgroup of its parent
            there = str(path.relative_to(tree.parent))
            (process,) = until(
                functools.partial(
                    lambda c, p, place: [
                        one for one in c.who(pid=p)["processes"] if one["cgroup"].endswith(place)
                    ],
                    client,
                    pid,
                    there,
                )
            )
            assert process["unit"] == f"user@{USER}.service"
    with DaemonClient(daemon.path) as client:
        account = client.stats()["account"]
    assert account["lost"]["failed"] == 0 and account["named"] > 0
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.text() and "does not close" not in daemon.text()


@pytest.mark.parametrize(
    "forged",
    [
        "a\f0::/system.slice/sshd.service",
        "system.slice/sshd.service",
        f"docker-{ID}.scope",
        f"docker/{ID}",
        "lxc.payload.db",
        f"kubepods.slice/kubepods-podx.slice/cri-containerd-{ID}.scope",
    ],
)
def test_a_users_cgroup_is_no_other_unit_and_no_other_container(
    receiver: socket.socket, tree: Any, forged: str
) -> None:
    with talker(receiver, tree / f"user@{USER}.service" / forged) as pid:
        found = procfs.details(pid, there(procfs.identity(pid)).start_ns)
    assert there(found).unit.startswith(f"user@{USER}.service")
    assert not there(found).container or f":user@{USER}/" in there(found).container


def test_below_a_slice_that_was_given_away_is_nothing(receiver: socket.socket, tree: Any) -> None:
    os.chown(tree, USER, USER)
    for forged in ("sshd.service", f"docker-{ID}.scope", "user@0.service/x.service"):
        with talker(receiver, tree / forged) as pid:
            found = procfs.details(pid, there(procfs.identity(pid)).start_ns)
        assert (there(found).unit, there(found).container) == ("", ""), forged
        assert there(found).cgroup.endswith(forged)


def test_a_name_that_reads_as_another_uid_does_not_change_the_rights(
    start: StartDaemon, receiver: socket.socket, tree: Any
) -> None:  # noqa: F811
    daemon = start()
    with talker(receiver, tree / "own.service", 0, "Uid:\t0\t0\t0") as pid:
        with DaemonClient(daemon.path) as client:
            reply = until(lambda: (r := client.who(pid=pid))["flows"] and r)
    assert [process["uid"] for process in reply["processes"]] == [USER]


def test_no_name_of_a_cgroup_stops_the_hunter_without_a_daemon(
    receiver: socket.socket, tree: Any, tmp_path: Path
) -> None:
    path = tree / f"user@{USER}.service" / "bad\rname"
    command = [sys.executable, "-m", "hunter", "--engine", "packet", "-n", "-c", "20"]
    command += ["--socket", str(tmp_path / "none"), "udp", "dst", "port"]
    with talker(receiver, path):
        done = subprocess.run(
            [*command, str(receiver.getsockname()[1])], capture_output=True, text=True, timeout=120
        )
    assert (done.returncode, len(done.stdout.split("\n"))) == (0, 21), done.stderr
    assert "20 shown" in done.stderr and "Traceback" not in done.stderr


BROKEN = """
import sys
from nlproto.pipeline import pipeline
def refuse(self, batches):
    raise ValueError("nobody foresaw {}".format(len(batches)))
pipeline.Pipeline._arrive = refuse
from {} import __main__ as program
{}
sys.exit(program.main())
"""


def test_a_hunter_that_cannot_name_ends_with_an_error_and_never_with_0(
    receiver: socket.socket, tree: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BROKEN.format("{}", "hunter", ""), "--engine", "packet", "-n"]
    command += ["--socket", str(tmp_path / "none"), "-c", "5"]
    with talker(receiver, tree / "x.service", 0):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert "worker cannot go on (ValueError: nobody foresaw" in done.stderr
    records = re.search(r"(\d+) records = 0 delivered \+ (\d+) lost \(.*failed", done.stderr)
    assert records and records[1] == records[2]


def test_a_hunter_that_lost_records_by_its_own_fault_says_so_at_the_end(
    receiver: socket.socket, tree: Any, tmp_path: Path
) -> None:
    """The engine delivers, one subscriber fails: Ctrl-C after a moment is no success."""
    command = [sys.executable, "-c", BROKEN.format("{}", "hunter", ""), "--engine", "packet", "-n"]
    command += ["--socket", str(tmp_path / "none"), "--duration", "2"]
    with talker(receiver, tree / "x.service", 0):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert re.search(r"\d+ records were lost by a fault of this program", done.stderr)


def test_a_daemon_whose_worker_only_fails_ends_with_1(
    receiver: socket.socket, tree: Any, tmp_path: Path
) -> None:
    short = "import daemon.service; real = daemon.service.Pipeline\n"
    short += "daemon.service.Pipeline = lambda *a, **k: real(*a, **k, patience=0.5)"
    command = [sys.executable, "-c", BROKEN.format("{}", "daemon", short), "--engine", "packet"]
    command += ["--foreground", "--socket", str(tmp_path / "d.sock")]
    with talker(receiver, tree / "x.service", 0):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "worker cannot go on" in done.stderr and "does not close" not in done.stderr


@pytest.fixture(name="namespaces")
def _namespaces() -> Iterator[list[str]]:
    names = [f"phfd{os.getpid()}x{number}" for number in range(8)]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_daemon_with_few_descriptors_serves_and_says_what_it_leaves_out(
    namespaces: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = ["prlimit", "--nofile=120:120", sys.executable, "-m", "daemon", "--foreground"]
    command += ["--engine", "packet", "--socket", str(tmp_path / "d.sock")]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    clients = []
    try:
        until(lambda: "serving" in log.read_text() or process.poll() is not None)
        for _ in range(120):  # more than there can be
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(tmp_path / "d.sock"))
            clients.append(client)
        until(lambda: "Too many open files" in log.read_text())
        for client in clients:
            client.close()
        until(lambda: _answers(str(tmp_path / "d.sock")))
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "are not captured" in text
    assert text.count("accept: ") <= 2 and "Traceback" not in text, text


def _answers(path: Any) -> bool:
    try:
        with DaemonClient(path) as client:
            return bool(client.stats()["clients"]["connected"] >= 1)
    except Exception:
        return False


def test_a_hunter_with_few_descriptors_captures_what_it_can(
    namespaces: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        ["prlimit", "--nofile=24:24", sys.executable, "-m", "hunter", "--engine", "packet"]
        + ["--socket", str(tmp_path / "none"), "--duration", "1", "-n"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "are not captured" in done.stderr
    assert "Traceback" not in done.stderr and "shown" in done.stderr
