# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import holders, procfs
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import KernelSockets
from waiting import noting, until


@pytest.fixture
def held() -> Iterator[tuple[Any, ...]]:
    """{inode: pid}: 30 processes with 20 UDP sockets each, and one socket that all of them have."""
    found: dict[Any, Any] = {}
    children = []
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


def test_many_sockets_are_asked_about_with_each_process_read_once(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50,000 sockets of 2,000 processes took minutes when each socket was asked about alone."""
    found, shared, children = held
    asked: list[Any] = []
    walks: list[Any] = []
    real_owner, real_walk = procfs.owner, procfs.held_sockets
    monkeypatch.setattr(procfs, "owner", noting(asked, real_owner))
    monkeypatch.setattr(procfs, "held_sockets", noting(walks, real_walk, len))
    answers = dict(Holders().find_many([*found, shared, 1], [0] * (len(found) + 2)))
    assert {inode: owners[0].identity.tgid for inode, owners in answers.items() if inode in found}
    assert all(
        [owner.identity.tgid for owner in answers[inode]] == [pid] for inode, pid in found.items()
    )
    assert {owner.identity.tgid for owner in answers[shared]} == {os.getpid(), *children}
    assert answers[1] == ()
    assert len(asked) == len(set(asked)) and len(walks) == 1


def test_few_sockets_are_asked_about_one_by_one(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, *_ = held
    inode, pid = next(iter(found.items()))
    monkeypatch.setattr(holders, "_MANY", 1)
    finder = Holders()
    finder.walk()
    monkeypatch.setattr(finder, "walk", None)
    ((one, owners),) = finder.find_many([inode], [0])
    assert (one, [owner.identity.tgid for owner in owners]) == (inode, [pid])


def test_halves_of_a_walk_are_one_answer(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, *_, children = held
    whole = procfs.held_sockets(children)
    monkeypatch.setattr(procfs, "_MANY", 2)
    halves = procfs.held_sockets(children)
    assert halves[1] is whole[1]
    assert sorted(halves[0].tolist()) == sorted(whole[0].tolist())


def test_a_look_has_every_bound_socket_with_its_holders(held: tuple[Any, ...]) -> None:
    found, shared, children = held
    with KernelSockets() as kernel:
        sockets = kernel.read()
    ours: dict[Any, Any] = {}
    for one in sockets.bound:
        ours.setdefault(one.tgid, []).append(one)
    assert all(len(ours[child]) == 21 for child in children)
    assert all(one.endpoint[3][:4] == b"\x7f\0\0\1" for child in children for one in ours[child])
    assert {one.cookie for child in children for one in ours[child]} <= set(
        sockets.cookies.tolist()
    )


_ASKING_NS = 10**7


class Clock:
    """Time passes only while processes are asked: 10 ms for each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 10**12
        self._held = procfs.held_sockets
        monkeypatch.setattr(procfs, "held_sockets", self._ask)

    def _ask(self, pids: Any, *proc: Any) -> Any:
        self.now_ns += _ASKING_NS * len(pids)
        return self._held(pids, *proc)


def search_for_none(finder: Holders, clock: Clock, uids: Iterable[int]) -> tuple[int, int, int]:
    """Ask about sockets without holders, without much pause: ns of work, of all, of a walk."""
    finder.walk()
    began, worked, walk = clock.now_ns, 0, clock.now_ns - 10**12
    for number, uid in enumerate(uids):
        clock.now_ns += walk // 4
        before = clock.now_ns
        assert finder.find(10**12 + number, uid) == ()
        worked += clock.now_ns - before
    return worked, clock.now_ns - began, walk


def test_one_users_sockets_without_holders_cost_a_part_of_the_time(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as only a message in flight refers to: 1,000 packets a second to them stopped all."""
    found, *_ = held
    clock = Clock(monkeypatch)
    finder = Holders(now_ns=lambda: clock.now_ns)
    worked, took, walk = search_for_none(finder, clock, [60_000] * 100)
    assert worked < took / holders._USER_SHARE + holders._USER_SAVED_NS + 2 * walk
    # others go on: root without any limit, another user since there is time left for all
    inode, pid = next(iter(found.items()))
    assert [owner.identity.tgid for owner in finder.find(inode, 0)] == [pid]
    clock.now_ns += 4 * walk  # what the last search took too much
    assert [owner.identity.tgid for owner in finder.find(inode, 60_001)] == [pid]


def test_searches_in_vain_soon_end_for_a_user(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They took a sixth of the time, and who asked the daemon waited for that."""
    clock = Clock(monkeypatch)
    finder = Holders(now_ns=lambda: clock.now_ns)
    finder.walk()
    began, walk = clock.now_ns, clock.now_ns - 10**12
    worked = 0
    for number in range(400):
        clock.now_ns += walk // 4
        before = clock.now_ns
        assert finder.find_soon(10**12 + number, 60_000) == ()
        worked += clock.now_ns - before
    share = 4 * holders._USER_SHARE
    assert worked < (clock.now_ns - began) / share + holders._USER_SAVED_NS + 2 * walk


def test_many_users_together_leave_root_its_time(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who maps 65,536 uids is 65,536 users."""
    found, *_ = held
    clock = Clock(monkeypatch)
    finder = Holders(now_ns=lambda: clock.now_ns)
    worked, took, walk = search_for_none(finder, clock, range(60_000, 60_100))
    assert worked < took / holders._USERS_SHARE + holders._USER_SAVED_NS + 2 * walk
    inode, pid = next(iter(found.items()))
    assert [owner.identity.tgid for owner in finder.find(inode, 0)] == [pid]


def test_sockets_that_nobody_holds_are_asked_about_now_and_then(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that 50 of them kept at 86 % of a processor did it for each look."""
    clock = Clock(monkeypatch)
    with KernelSockets(Holders(now_ns=lambda: clock.now_ns), lambda: clock.now_ns) as kernel:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with left, right:
            carried = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(50)]
            for one in carried:
                one.bind(("127.0.0.1", 0))
            socket.send_fds(left, [b"x"], [one.fileno() for one in carried])
            for one in carried:
                one.close()
            kernel.read()
            began, worked = clock.now_ns, 0
            for _ in range(40):
                clock.now_ns += 2500 * 10**6
                before = clock.now_ns
                kernel.read()
                worked += clock.now_ns - before
    # a hundredth each for checks, these, and new connections; walks; what others do meanwhile
    assert worked < (clock.now_ns - began) * 0.25


def test_a_first_look_asks_each_process_once(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[Any] = []
    real = procfs.held_sockets
    monkeypatch.setattr(procfs, "held_sockets", noting(walks, real, len))
    monkeypatch.setattr(holders, "_MANY", 10)
    with KernelSockets() as kernel:
        kernel.read()
    assert len(walks) == 1


Newborn = Callable[[], tuple[int, Callable[[], int]]]


@pytest.fixture
def newborn() -> Iterator[Newborn]:
    """Start a process that opens a socket when it is told to: its pid, and what tells it."""
    children: list[int] = []

    def start() -> tuple[int, Callable[[], int]]:
        go, told = os.pipe()
        reading, answer = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(go, 1)
            kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            os.write(answer, str(os.fstat(kept.fileno()).st_ino).encode())
            signal.pause()
            os._exit(0)
        children.append(child)

        def tell() -> int:
            os.write(told, b"x")
            return int(os.read(reading, 100))

        return child, tell

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("known", [False, True], ids=["just born", "known already"])
def test_the_youngest_are_asked_without_the_list_of_all(
    known: bool, newborn: Newborn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that lives a millisecond is gone before that is read."""
    finder = Holders()
    finder.walk()
    child, tell = newborn()
    if known:  # as one who has no socket yet
        finder._ask_born(0)
        assert child in finder._known
    inode = tell()
    monkeypatch.setattr(procfs, "pids", None)
    assert [one.identity.tgid for one in finder.find_soon(inode, 0)] == [child]


def test_processes_are_listed_again_only_where_one_came_or_went(
    newborn: Newborn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet of a known socket need not cost a list of thousands."""
    listed, ahead_ns, pids = [], [0], procfs.pids

    def counted(proc: Path) -> list[int]:
        listed.append(proc)
        return pids(proc)

    monkeypatch.setattr(procfs, "pids", counted)
    finder = Holders(now_ns=lambda: time.monotonic_ns() + ahead_ns[0])

    def quiet() -> bool:
        for _ in range(3):
            ahead_ns[0] += 1_000_000_000
            del listed[:]
            finder._ask_born(0)
        return not listed

    until(quiet, 20, "three looks between two births on this machine")
    child, _ = newborn()
    finder._ask_born(0)
    assert child in finder._known


def test_a_thread_is_no_process() -> None:
    """/proc has its number too, with the descriptors of its process."""
    finder = Holders()
    finder.walk()
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    with socket.socket() as one:
        inode = os.fstat(one.fileno()).st_ino
        finder.meet_newest()
        assert thread.native_id not in finder._by_inode.get(inode, ())
        assert [one.identity.tgid for one in finder.find(inode)] == [os.getpid()]
    ended.set()
    thread.join()


def test_who_is_born_may_have_inherited_a_socket(newborn: Newborn) -> None:
    finder = Holders()
    with socket.socket() as one, socket.socket() as later:
        inode = os.fstat(one.fileno()).st_ino
        assert finder.find(inode)
        now = time.monotonic_ns()
        other = os.fstat(later.fileno()).st_ino
        assert not finder.may_be_inherited(inode, now)
        newborn()
        finder.meet_newest()
        assert finder.may_be_inherited(inode, now) and finder.may_be_inherited(other, now)
        assert not finder.may_be_inherited(inode, time.monotonic_ns())


def test_a_walk_of_one_thread_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker, watcher and engine of the daemon ask the same Holders."""
    walking, go_on = threading.Event(), threading.Event()
    real = procfs.held_sockets

    def slow(pids: Any, *rest: Any) -> Any:
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


def test_a_socket_made_while_another_thread_walks_is_found_when_that_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walking, go_on = threading.Event(), threading.Event()
    real = procfs.held_sockets

    def slow(pids: Any, *rest: Any) -> Any:
        found = real(pids, *rest)
        if threading.current_thread() is walker:
            walking.set()
            assert go_on.wait(10)
        return found

    shared = Holders()
    shared.find_soon(1, 0)  # everybody is known, nobody as one who has sockets
    walker = threading.Thread(target=shared.walk)
    monkeypatch.setattr(procfs, "held_sockets", slow)
    monkeypatch.setattr("nlproto.host.holders._WALK_WAIT_S", 10)
    walker.start()
    assert walking.wait(10)
    with socket.socket() as sock:
        shared._talkers.clear()
        threading.Timer(0.2, go_on.set).start()
        inode = os.fstat(sock.fileno()).st_ino
        assert [one.identity.tgid for one in shared.find(inode)] == [os.getpid()]
    walker.join()


def test_whether_everybody_was_asked_is_each_threads_own_answer() -> None:
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


def test_the_daemon_walks_processes_for_their_sockets_in_one_place() -> None:
    folder = Path(holders.__file__).parents[2] / "daemon"
    made = {path.name for path in folder.rglob("*.py") if "Holders()" in path.read_text()}
    assert made == {"service.py"}


def test_a_socket_that_nobody_has_costs_a_hundredth_of_the_time(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own (a tunnel, a mount), at 20 packets a second: it was a quarter."""
    clock = Clock(monkeypatch)
    finder = Holders(now_ns=lambda: clock.now_ns)
    walks: list[int] = []
    whole = finder.walk

    def counted() -> object:
        walks.append(1)
        return whole()

    monkeypatch.setattr(finder, "walk", counted)
    began = clock.now_ns
    finder.walk()
    walk_ns = clock.now_ns - began
    for _ in range(2000):
        clock.now_ns += 200_000_000
        for inode in (10**12, 10**12 + 1, 10**12 + 2):
            assert finder.find_anywhere(inode, 0) == ()
    assert len(walks) * walk_ns < (clock.now_ns - began) / 50 + 12 * walk_ns
    found, *_ = held
    inode, pid = next(iter(found.items()))  # and all that time others are found
    assert [one.identity.tgid for one in finder.find(inode)] == [pid]


def test_who_has_many_sockets_is_left_alone_while_others_talk(
    held: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50,000 idle sockets were read again for each new one of another process."""
    found, shared, children = held
    monkeypatch.setattr(holders, "_LARGE", 19)
    large = set(children[:3])
    asked: list[int] = []
    clock = Clock(monkeypatch)
    ask = procfs.held_sockets

    def noted(pids: Any, *proc: Any) -> Any:
        asked.extend(large.intersection(pids))
        return ask(pids, *proc)

    monkeypatch.setattr(procfs, "held_sockets", noted)
    finder = Holders(now_ns=lambda: clock.now_ns)
    finder.walk()
    finder._large &= large
    asked.clear()
    began = clock.now_ns
    for _ in range(100):
        clock.now_ns += 10**9
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            inode = os.fstat(one.fileno()).st_ino
            owners = finder.find_soon(inode, 0) or finder.find_anywhere(inode, 0)
            assert [owner.identity.tgid for owner in owners] == [os.getpid()]
        assert finder.find_soon(10**12 + clock.now_ns, 0) == ()
        finder._large &= large  # the others stand for small ones here
    took = clock.now_ns - began
    walk = _ASKING_NS * len(children)
    assert len(asked) * _ASKING_NS < took / holders._IDLE_SHARE + 2 * walk
    inode, pid = next((one, pid) for one, pid in found.items() if pid in large)
    assert [owner.identity.tgid for owner in finder.find_soon(inode, 0)] == [pid]
    asked.clear()
    finder.find_soon(10**13, 0)  # it had traffic: a new one may be its own
    assert pid in asked
