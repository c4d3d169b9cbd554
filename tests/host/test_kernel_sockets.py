# SPDX-License-Identifier: MIT
"""The look at bound sockets: what changed, and work for that alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.system.watcher import Watcher
from nlproto.errors import Error
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import KernelSockets
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from waiting import stand_in, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="holders of all sockets need root")

ADDRESS = "127.0.7.31"


class Counting(Holders):
    asked = 0

    def find(self, inode: int, uid: int = 0) -> Any:
        self.asked += 1
        return super().find(inode, uid)


def bound(port: int = 0, reuse: bool = False) -> Any:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if reuse:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind((ADDRESS, port))
    return one


class Keeping:
    """As the watcher does it."""

    def __init__(self) -> None:
        self.holders = Counting()
        self.kernel = KernelSockets(self.holders)
        self.portmap = PortMap()

    def look(self) -> Any:
        before = time.monotonic_ns()
        found = self.kernel.read()
        self.portmap.update_bound(found.bound, found.changed, there(found.present), before)
        return found

    def pids(self, one: Any) -> list[Any]:
        """Of its own address: any process of this machine may have the same port elsewhere."""
        return sorted(owner.tgid for owner in self.owners(one.getsockname()[1]))

    def owners(self, port: int) -> list[Any]:
        address = (socket.AF_INET, socket.inet_aton(ADDRESS).ljust(16, b"\0"))
        found = self.portmap.who(port, socket.IPPROTO_UDP, address)
        return [owner for owner in found if owner.endpoint[3][:4] == address[1][:4]]


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    one = Keeping()
    with one.kernel:
        yield one


def test_a_look_asks_only_about_what_is_new(keeping: Keeping) -> None:
    many = [bound() for _ in range(900)]
    # who cannot be found at once is looked for again, some at each look
    until(lambda: keeping.look() and all(keeping.pids(one) == [os.getpid()] for one in many))
    keeping.kernel._checks_ns = time.monotonic_ns() + 10**12  # a round of checks is another test
    keeping.kernel._unchecked = []
    new = bound()
    before = keeping.holders.asked
    found = keeping.look()
    assert keeping.holders.asked - before < 250  # the new one, and sockets of the kernel's own
    assert len(found.bound) < 250
    assert keeping.pids(new) == [os.getpid()]
    gone, port = many[0], many[0].getsockname()[1]
    gone.close()
    keeping.look()
    assert keeping.owners(port) == []
    assert all(keeping.pids(one) == [os.getpid()] for one in many[1:])
    for one in [*many, new]:
        one.close()


def test_a_round_of_checks_takes_a_part_of_the_time(keeping: Keeping) -> None:
    """Twenty thousand sockets are not all asked about each 3 s."""
    many = [bound() for _ in range(900)]
    keeping.look()
    clock = keeping.kernel._check_budget
    clock._left_ns = 0
    keeping.kernel._checks_ns = 0
    before = keeping.holders.asked
    keeping.look()
    assert keeping.holders.asked - before < 450
    for one in many:
        one.close()


def test_a_socket_that_was_handed_over_has_its_new_holder_alone(keeping: Keeping) -> None:
    one = bound()
    keeping.look()
    assert keeping.pids(one) == [os.getpid()]
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=[one.fileno()],
    )
    try:
        name = one.getsockname()[1]
        one.close()
        end = time.monotonic() + 60
        while [owner.tgid for owner in keeping.owners(name)] != [child.pid]:
            assert time.monotonic() < end, keeping.owners(name)
            keeping.look()
            time.sleep(0.05)
    finally:
        child.communicate()


def test_one_of_two_sockets_at_one_end_may_close(keeping: Keeping) -> None:
    first = bound(reuse=True)
    port = first.getsockname()[1]
    second = bound(port, reuse=True)
    keeping.look()
    for closing, staying in ((first, second), (second, None)):
        closing.close()
        keeping.look()
        owners = [owner.tgid for owner in keeping.owners(port)]
        assert owners == ([os.getpid()] if staying else [])


def test_an_idle_connection_that_is_new_is_known_after_two_looks(keeping: Keeping) -> None:
    """Between two rounds. No packet shows it."""
    keeping.look()
    code = (
        "import socket, sys\n"
        "server = socket.create_server(('127.0.7.32', 0))\n"
        "peer = socket.create_connection(server.getsockname())\n"
        "print(peer.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(there(child.stdout).readline())
        keeping.look()
        end = time.monotonic() + 30
        found: list[Any] = []
        while not found:
            assert time.monotonic() < end
            found = [one for one in keeping.look().connected if one.endpoint[4] == port]
        assert {one.tgid for one in found} == {child.pid}
        assert not [one for one in keeping.look().connected if one.endpoint[4] == port]
    finally:
        child.communicate("")


def test_a_look_asks_about_some_new_sockets_of_users_and_all_of_roots(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who opens 100,000 does not hold up the look, nor another user's sockets."""
    monkeypatch.setattr("nlproto.host.kernel_sockets._NEW", 5)
    until(lambda: keeping.look() and not keeping.kernel._unheld)
    asked: list[int] = []
    ask = keeping.kernel._ask

    def noted(sockets: Any, together: bool = False) -> set[int]:
        asked.extend([] if together else sockets["uid"].tolist())
        return ask(sockets, together)

    stand_in(keeping.kernel)._ask = noted
    many = [of_user(61001) for _ in range(30)]
    other, roots = of_user(61002), [bound() for _ in range(10)]
    keeping.look()
    assert sorted(set(asked)) == [0, 61001, 61002]
    assert asked.count(0) >= 10 and asked.count(61001) + asked.count(61002) == 5
    assert all(keeping.pids(one) == [os.getpid()] for one in (other, *roots))
    until(lambda: keeping.look() and all(keeping.pids(one) == [os.getpid()] for one in many))


def of_user(uid: int) -> Any:
    os.seteuid(uid)
    try:
        return bound()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("others_ns", [50_000_000, None])
def test_a_look_that_somebody_waits_for_searches_holders_for_a_moment(
    others_ns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search reads many processes, or waits for a walk."""
    now, over = [time.monotonic_ns()], []
    holders = Holders()
    find = holders.find

    def slow(inode: int, uid: int = 0) -> Any:
        over.append(holders.beside.is_over())
        now[0] += 50_000_000
        return find(inode, uid)

    monkeypatch.setattr(holders, "find", slow)
    with KernelSockets(holders, lambda: now[0], others_ns) as kernel:
        kernel.read()
        over.clear()
        many = [bound() for _ in range(20)]
        kernel.read()
        assert len(over) >= len(many)
        assert over[:4] == [False] * 4 and any(over) == (others_ns is not None)
        assert not holders.beside.is_over()


def test_a_look_ends_when_its_time_is_over_and_the_next_one_goes_on() -> None:
    """Somebody waits for it, and a user can open many sockets. It says whose it left out."""

    class Slow(Holders):
        def find(self, inode: int, uid: int = 0) -> Any:
            time.sleep(0.02)  # as where many processes are asked
            return super().find(inode, uid)

    with KernelSockets(Slow(), others_ns=50_000_000) as kernel:
        until(lambda: kernel.read() and not kernel.is_behind(None), 30, "all that was there")
        many = [of_user(61001) for _ in range(60)]
        began = time.monotonic()
        kernel.read()
        assert time.monotonic() - began < 60 * 0.02
        assert kernel.is_behind(None) and kernel.is_behind(61001) and not kernel.is_behind(0)
        until(lambda: kernel.read() and not kernel.is_behind(None), 30, "the others")
        cookies = {one.getsockopt(socket.SOL_SOCKET, 57, 8) for one in many}  # SO_COOKIE
        assert {int.from_bytes(one, sys.byteorder) for one in cookies} <= kernel._held.keys()
        for one in many:
            one.close()


def test_a_look_ahead_is_the_first_result_and_counts_from_its_own_beginning(
    keeping: Keeping,
) -> None:
    before = bound()
    keeping.kernel.look_ahead()
    until(lambda: keeping.kernel.looked_ns, 60, "a look without being asked")
    looked_ns, after = keeping.kernel.looked_ns, bound()
    pipeline = SimpleNamespace(portmap=keeping.portmap, processes=Processes())
    watcher = Watcher(
        "packet",
        stand_in(pipeline),
        lambda *_, **__: None,
        print,
        keeping.holders,
        kernel=keeping.kernel,
    )
    watcher._look_at_sockets()
    assert (keeping.kernel.looked_ns, watcher._looked) == (looked_ns, looked_ns / 1e9)
    assert (keeping.pids(before), keeping.pids(after)) == ([os.getpid()], [])
    watcher._look_at_sockets()
    assert keeping.pids(after) == [os.getpid()]
    before.close()
    after.close()


def test_a_look_ahead_that_fails_is_told_to_who_reads_and_the_next_read_looks(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise Error("no room")

    with monkeypatch.context() as broken:
        broken.setattr(KernelSockets, "_read", fail)
        keeping.kernel.look_ahead()
        with pytest.raises(Error, match="no room"):
            keeping.kernel.read()
    assert keeping.kernel.looked_ns == 0
    keeping.kernel.read()
    assert keeping.kernel.looked_ns > 0
