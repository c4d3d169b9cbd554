# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from nlproto.host import holders, procfs
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import KernelSockets


@pytest.fixture
def held():
    """{inode: pid}: 30 processes with 20 UDP sockets each, and one socket that all of them have."""
    found, children = {}, []
    shared = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    shared.bind(("127.0.0.1", 0))
    for _ in range(30):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            kept = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
            for one in kept:
                one.bind(("127.0.0.1", 0))
            os.write(writing, " ".join(str(os.fstat(s.fileno()).st_ino) for s in kept).encode())
            os.close(writing)
            signal.pause()
            os._exit(0)
        os.close(writing)
        inodes = os.read(reading, 4096).split()
        os.close(reading)
        children.append(child)
        found |= {int(inode): child for inode in inodes}
    yield found, os.fstat(shared.fileno()).st_ino, children
    shared.close()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_many_sockets_are_asked_about_with_each_process_read_once(held, monkeypatch):
    """50,000 sockets of 2,000 processes took minutes when each socket was asked about alone."""
    found, shared, children = held
    asked, walks = [], []
    real_owner, real_walk = procfs.owner, procfs.held_sockets
    monkeypatch.setattr(
        procfs, "owner", lambda pid, proc=procfs.PROC: asked.append(pid) or real_owner(pid, proc)
    )
    monkeypatch.setattr(procfs, "held_sockets", lambda *a: walks.append(len(a[0])) or real_walk(*a))
    answers = dict(Holders().find_many([*found, shared, 1]))
    assert {inode: owners[0].identity.tgid for inode, owners in answers.items() if inode in found}
    assert all(
        [owner.identity.tgid for owner in answers[inode]] == [pid] for inode, pid in found.items()
    )
    assert {owner.identity.tgid for owner in answers[shared]} == {os.getpid(), *children}
    assert answers[1] == ()
    assert len(asked) == len(set(asked)) and len(walks) == 1


def test_few_sockets_are_asked_about_one_by_one(held, monkeypatch):
    found, *_ = held
    inode, pid = next(iter(found.items()))
    monkeypatch.setattr(holders, "_MANY", 1)
    finder = Holders()
    finder.walk()
    monkeypatch.setattr(finder, "walk", None)
    ((one, owners),) = finder.find_many([inode])
    assert (one, [owner.identity.tgid for owner in owners]) == (inode, [pid])


def test_halves_of_a_walk_are_one_answer(held, monkeypatch):
    found, *_, children = held
    whole = procfs.held_sockets(children)
    monkeypatch.setattr(procfs, "_MANY", 2)
    halves = procfs.held_sockets(children)
    assert halves[1] is whole[1]
    assert sorted(halves[0].tolist()) == sorted(whole[0].tolist())


def test_a_look_has_every_bound_socket_with_its_holders(held):
    found, shared, children = held
    with KernelSockets() as kernel:
        sockets = kernel.read()
    ours = {}
    for one in sockets.bound:
        ours.setdefault(one.tgid, []).append(one)
    assert all(len(ours[child]) == 21 for child in children)
    assert all(one.endpoint[3][:4] == b"\x7f\0\0\1" for child in children for one in ours[child])
    assert {one.cookie for child in children for one in ours[child]} <= set(
        sockets.cookies.tolist()
    )


def test_a_walk_of_one_thread_holds_up_no_other(monkeypatch):
    """Worker, watcher and engine of the daemon ask the same Holders."""
    walking, go_on = threading.Event(), threading.Event()
    real = procfs.held_sockets

    def slow(pids, *rest):
        if threading.current_thread() is walker:
            walking.set()
            assert go_on.wait(10)
        return real(pids, *rest)

    shared = Holders()
    walker = threading.Thread(target=shared.walk)
    monkeypatch.setattr(procfs, "held_sockets", slow)
    with socket.socket() as sock:
        walker.start()
        assert walking.wait(10)
        inode = os.fstat(sock.fileno()).st_ino
        assert not shared.due()  # one walk at a time
        assert [one.identity.tgid for one in shared.find(inode)] == [os.getpid()]
        go_on.set()
        walker.join()
        assert [one.identity.tgid for one in shared.known(inode)] == [os.getpid()]


def test_whether_everybody_was_asked_is_each_threads_own_answer():
    shared = Holders()
    shared.find_anywhere(1)
    if not shared.complete:
        pytest.skip("needs root")
    assert shared.exhaustive
    others = []
    thread = threading.Thread(target=lambda: others.append(shared.exhaustive))
    thread.start()
    thread.join()
    assert others == [False]


def test_the_daemon_walks_processes_for_their_sockets_in_one_place():
    folder = Path(holders.__file__).parents[2] / "daemon"
    made = {path.name for path in folder.rglob("*.py") if "Holders()" in path.read_text()}
    assert made == {"service.py"}
