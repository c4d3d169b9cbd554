# SPDX-License-Identifier: MIT
"""Whose a network namespace is, asked of the kernel, and which are captured when they are many."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import netns, procfs
from nlproto.host.namespace_sockets import PerNamespace
from nlproto.host.socket_lookup import SocketLookup
from nlproto.running import descriptors
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")

USER = 65534
INSIDE = ["unshare", "-Urn"]


def started(command: Any, user: Any = None) -> tuple[Any, ...]:
    """A process in namespaces of its own; its netns path."""
    child = subprocess.Popen(
        [*command, "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE, user=user
    )
    if not there(child.stdout).readline():
        child.wait()
        pytest.skip("users may not make user namespaces here")
    return child, Path(f"/proc/{child.pid}/ns/net")


@pytest.fixture
def namespaces() -> Iterator[Any]:
    """Starts a process in namespaces of its own; its netns path."""
    with contextlib.ExitStack() as stack:

        def make(command: Any, user: Any = None) -> Any:
            child, path = started(command, user)
            stack.callback(child.stdout.close)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return path

        yield make


@pytest.mark.parametrize(
    ("command", "user", "owner"),
    [
        (["unshare", "-n"], None, None),
        (INSIDE, USER, USER),
        ([*INSIDE, *INSIDE, *INSIDE], USER, USER),
        (INSIDE, None, 0),
    ],
    ids=["ours", "users", "nested", "roots_user_namespace"],
)
def test_a_namespace_is_of_who_made_the_outermost_user_namespace(
    namespaces: Any, command: Any, user: Any, owner: Any
) -> None:
    path = namespaces(command, user)
    assert netns.owner(path, path.stat().st_ino) == owner


def test_a_namespace_whose_place_another_took_is_not_entered(namespaces: Any) -> None:
    """A pid that is used again: what is found there belongs to another namespace."""
    path, entered = namespaces(["unshare", "-n"]), []
    with pytest.raises(FileNotFoundError, match="is there no more"):
        netns.run_inside(path, netns.own(), lambda: entered.append(netns.own()))
    with pytest.raises(FileNotFoundError, match="is there no more"):
        netns.owner(path, netns.own())
    assert entered == []
    assert netns.owner_or_unknown(path, netns.own()) == netns.UNKNOWN_OWNER
    inside = Path("/proc/thread-self/ns/net")
    assert netns.run_inside(path, path.stat().st_ino, lambda: inside.stat().st_ino) == (
        path.stat().st_ino
    )


def test_sockets_of_proc_count_while_they_are_of_their_namespace() -> None:
    """/proc/PID/net shows another namespace when the pid is used again."""
    with socket.socket(type=socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        net = Path(f"/proc/{os.getpid()}/net")
        for inode, count in ((netns.own(), 1), (netns.own() + 1, 0)):
            lookup = SocketLookup(None, time.monotonic_ns, net, inode)
            assert len(lookup.bound(socket.IPPROTO_UDP, port)) == count


def test_a_namespace_that_was_missed_once_is_read_by_the_next_look(namespaces: Any) -> None:
    path = namespaces(["unshare", "-n"])
    inode, missed = path.stat().st_ino, []

    def paths(*_: object) -> dict[int, Path]:
        wrong = Path("/proc/self/ns/net")
        missed.append(inode)
        return {netns.own(): wrong, inode: wrong if len(missed) == 1 else path}

    now = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netns.Finder, "paths", paths)
        with PerNamespace(lambda: socket.socket(), lambda: now[0]) as sockets:
            assert inode not in sockets.there()
            now[0] += 3_000_000_000
            assert inode in sockets.there()


MOVES = "import ctypes, sys; print(); input(); ctypes.CDLL(None).unshare(1 << 30); print(); input()"


@pytest.mark.parametrize("age_s", [0, 10])
def test_a_process_that_enters_a_new_namespace_is_found_young_or_old(age_s: int) -> None:
    """Nothing in /proc but its own link tells that."""
    ahead_ns = [0]
    finder = netns.Finder(now_ns=lambda: time.monotonic_ns() + ahead_ns[0])
    child = subprocess.Popen([sys.executable, "-c", MOVES], stdin=-1, stdout=-1, bufsize=0)
    with child:
        there(child.stdout).readline()
        before = finder.paths()
        ahead_ns[0] = age_s * 1_000_000_000
        finder.paths()
        there(child.stdin).write(b"\n")
        there(child.stdout).readline()
        inode = os.stat(f"/proc/{child.pid}/ns/net").st_ino
        assert inode not in before
        assert age_s or inode in finder.paths(), "who is young is read at each look"
        until(lambda: inode in finder.paths(), 10, "its namespace is found")
        there(child.stdin).write(b"\n")
    assert inode not in finder.paths(), "it has ended"


def test_a_namespace_that_got_a_name_is_found_until_the_name_goes(tmp_path: Path) -> None:
    name = tmp_path / "netns" / "one"
    name.parent.mkdir()
    finder = netns.Finder(named=name.parent)
    own = set(finder.paths())
    name.touch()
    finder.paths()
    script = 'exec unshare -n mount --bind /proc/self/ns/net "$0"'
    subprocess.run(["sh", "-c", script, name], check=True)
    try:
        found = finder.paths()
        assert found[name.stat().st_ino] == name
        assert name.stat().st_ino not in own
    finally:
        subprocess.run(["umount", name], check=True)
    name.unlink()
    assert name not in finder.paths().values()


def test_where_nothing_happens_no_process_is_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    pids = procfs.pids

    def counted(proc: Path) -> list[int]:
        listed.append(proc)
        return pids(proc)

    monkeypatch.setattr(procfs, "pids", counted)
    finder = netns.Finder()
    finder.paths()

    def quiet() -> bool:
        del listed[:]
        for _ in range(5):
            finder.paths()
        return not listed

    until(quiet, 20, "five looks between two births on this machine")


ENGINE = """
import resource, sys
from nlproto.engines.packet import PacketEngine
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
with PacketEngine(lambda note: print("told", note, flush=True)) as engine:
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in engine.read(0.2): pass
        print(*engine._places, flush=True)
"""


@pytest.fixture
def engine() -> Iterator[Any]:
    """An engine in a process of its own with so many descriptors; its lines."""
    with contextlib.ExitStack() as stack:

        def start(descriptors: Any) -> Any:
            child = subprocess.Popen(
                [sys.executable, "-c", ENGINE, str(descriptors)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def captured(child: Any) -> set[int]:
    """The namespaces that it captures now; what it tells is left out."""
    child.stdin.write("\n")
    child.stdin.flush()
    while (line := child.stdout.readline()).startswith(("told", "ready")):
        pass
    assert line, "the engine ended"
    return {int(word) for word in line.split()}


def test_a_users_many_namespaces_leave_places_for_root(namespaces: Any, engine: Any) -> None:
    roots = [
        path for inode, path in netns.paths().items() if not netns.owner_or_unknown(path, inode)
    ]
    room = len(roots) + 6
    theirs = {namespaces(INSIDE, USER).stat().st_ino for _ in range(20)}
    child = engine(2 * (descriptors._PER_NETNS * (room + 1) + 64))
    until(lambda: len(captured(child)) > room)
    ours = namespaces(["unshare", "-n"]).stat().st_ino
    until(lambda: ours in captured(child))
    assert not theirs <= captured(child)


def test_few_descriptors_are_enough_for_its_own_namespace(namespaces: Any, engine: Any) -> None:
    for _ in range(6):
        namespaces(["unshare", "-n"])
    child = engine(24)
    assert child.stdout.readline().startswith("told")
    assert captured(child) == {netns.own()}


WAITS = """
import threading, time
from nlproto.engines.packet import PacketEngine

def waited(engine, timeout):
    began = time.monotonic()
    list(engine.read(timeout))
    return time.monotonic() - began

with PacketEngine(print, everywhere=False) as engine:
    engine.wake()
    print(waited(engine, 60), waited(engine, 0.5), flush=True)
engine.wake()
"""


def test_a_read_waits_for_packets_and_for_whoever_wakes_it() -> None:
    """In a namespace without packets. After its end nothing is left to wake."""
    command = ["unshare", "-n", sys.executable, "-c", WAITS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    woken, alone = map(float, done.stdout.split())
    assert woken < 30
    assert alone >= 0.5
