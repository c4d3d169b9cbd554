# SPDX-License-Identifier: MIT
"""Holders of sockets and details of processes, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from nlproto.host import procfs
from nlproto.host.holders import Holders
from waiting import there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read /proc of others")


def inode(sock: socket.socket) -> Any:
    return os.fstat(sock.fileno()).st_ino


@pytest.fixture
def sock() -> Iterator[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        yield made


@pytest.fixture
def spawned() -> Iterator[Any]:
    running = []

    def spawn(code: Any, **options: Any) -> Any:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        running.append(child)
        return child

    yield spawn
    for child in running:
        child.kill()
        child.wait()
        there(child.stdin).close()
        there(child.stdout).close()


BIND = """
import os, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0))
print(os.fstat(s.fileno()).st_ino, flush=True)
sys.stdin.read()
"""


def test_the_descriptors_of_a_process_are_listed(sock: socket.socket) -> None:
    assert there(procfs.socket_inodes(os.getpid()))[inode(sock)] == sock.fileno()


def test_more_sockets_than_one_read_takes_are_all_listed() -> None:
    made = [socket.socket(socket.AF_UNIX) for _ in range(900)]
    copies = [one.dup() for one in made[:400]]
    try:
        assert {inode(one) for one in made} <= there(procfs.socket_inodes(os.getpid())).keys()
    finally:
        for one in made + copies:
            one.close()


def test_a_holder_is_found_with_comm_and_start(sock: socket.socket) -> None:
    (found,) = Holders().find(inode(sock))
    assert found.identity == procfs.identity(os.getpid())
    assert found.uid == os.getuid()


def test_a_process_born_after_the_walk_is_found(spawned: Any) -> None:
    holders = Holders()
    holders.walk()
    child = spawned(BIND)
    number = int(child.stdout.readline())
    assert [one.identity.tgid for one in holders.find(number)] == [child.pid]


def test_a_parent_that_holds_a_childs_socket_too_is_found_with_it(
    sock: socket.socket, spawned: Any
) -> None:
    """A socket made since the walk and inherited at once: the newborn is asked first."""
    holders = Holders()
    holders.walk()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.set_inheritable(True)
        child = spawned("import sys; print(1, flush=True); sys.stdin.read()", close_fds=False)
        child.stdout.readline()
        found = holders.find_soon(inode(made), 0)
    assert {one.identity.tgid for one in found} == {child.pid, os.getpid()}


def test_who_never_held_a_socket_alone_comes_youngest_first(
    sock: socket.socket, spawned: Any
) -> None:
    sock.set_inheritable(True)
    child = spawned("import sys; sys.stdin.read()", close_fds=False)
    holders = Holders()
    holders.walk()
    assert [one.identity.tgid for one in holders.find(inode(sock))] == [child.pid, os.getpid()]


@pytest.mark.parametrize("seen_by", ["find", "walk"])
def test_who_held_a_socket_alone_stays_its_user_until_it_lets_go(
    sock: socket.socket, spawned: Any, seen_by: str
) -> None:
    holders = Holders()
    holders.find(inode(sock)) if seen_by == "find" else holders.walk()
    sock.set_inheritable(True)
    child = spawned("import sys; sys.stdin.read()", close_fds=False)
    holders.walk()
    number = inode(sock)
    assert [one.identity.tgid for one in holders.find(number)] == [os.getpid(), child.pid]
    sock.close()
    assert [one.identity.tgid for one in holders.find(number)] == [child.pid]


def test_a_holder_that_closed_or_died_is_no_holder_any_more(
    sock: socket.socket, spawned: Any
) -> None:
    sock.set_inheritable(True)
    child = spawned("import sys; sys.stdin.read()", close_fds=False)
    holders = Holders()
    holders.walk()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [one.identity.tgid for one in holders.find(inode(sock))] == [os.getpid()]
    number = inode(sock)
    sock.close()
    assert holders.find(number) == ()


def test_an_exec_changes_the_comm_but_not_the_holder(spawned: Any) -> None:
    child = spawned(BIND + "s.set_inheritable(True); os.execv('/bin/sleep', ['sleep', '60'])")
    number = int(child.stdout.readline())
    holders = Holders()
    assert holders.find(number)[0].comm.startswith(b"python")
    child.stdin.close()
    until(lambda: holders.find(number)[0].comm == b"sleep")
    assert holders.find(number)[0].identity.tgid == child.pid


def test_details_of_another_users_process_are_told(spawned: Any) -> None:
    drop = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    child = spawned(drop + "; print(flush=True); sys.stdin.read()")
    child.stdout.readline()
    start = there(procfs.identity(child.pid)).start_ns
    found = procfs.details(child.pid, start, cmdline="full")
    assert (there(found).uid, there(found).user, there(found).ppid) == (
        65534,
        "nobody",
        os.getpid(),
    )
    assert there(found).exe.startswith("/") and "sys.stdin.read()" in there(found).cmdline


def test_a_zombie_has_no_exe_and_no_exception(spawned: Any) -> None:
    child = spawned("pass")
    start = there(procfs.identity(child.pid)).start_ns
    until(lambda: not procfs.socket_inodes(child.pid))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = procfs.details(child.pid, start)
    assert found is None or found.exe == ""


def test_a_dead_process_is_nobody(spawned: Any) -> None:
    child = spawned("pass")
    start = there(procfs.identity(child.pid)).start_ns
    child.wait()
    assert procfs.details(child.pid, start) is None
