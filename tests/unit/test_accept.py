# SPDX-License-Identifier: MIT
"""Connections that wait are accepted in one call; who has no room is refused in it (root)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from daemon.system.rights import peer_of
from nlproto._host import ffi, lib

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="clients of other users need root")

SOMEBODY, GROUP, OTHER_GROUP = 61001, 61002, 61003


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.setblocking(False)
        one.bind("")  # any abstract name: no directory has to let the user through
        one.listen(64)
        yield one


@contextlib.contextmanager
def connected(
    listener: socket.socket, times: int, uid: int, gid: int = SOMEBODY, groups: Any = ()
) -> Iterator[None]:
    """So many connections of a user."""
    before = os.getgroups()
    made = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(times)]
    try:
        os.setgroups(groups)
        os.setegid(gid)
        os.seteuid(uid)
        for one in made:
            one.connect(listener.getsockname())
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
    yield
    for one in made:
        one.close()


def accept(listener: socket.socket, most: int, shut: Any = (), group: int = -1) -> Any:
    """(uids of those accepted, how many were refused), or -errno."""
    fds, refused = ffi.new("int[]", most), ffi.new("uint32_t *")
    found = lib.host_accept(listener.fileno(), fds, most, list(shut), len(shut), group, refused)
    if found < 0:
        return found
    uids = []
    for fd in ffi.unpack(fds, found):
        assert not os.get_inheritable(fd) and not os.get_blocking(fd)
        with socket.socket(fileno=fd) as one:
            uids.append(peer_of(one).uid)
    return uids, refused[0]


def test_all_that_wait_are_taken_at_once_but_no_more_than_asked_for(
    listener: socket.socket,
) -> None:
    assert accept(listener, 8) == -errno.EAGAIN
    with connected(listener, 5, 0), connected(listener, 2, SOMEBODY):
        assert accept(listener, 4) == ([0] * 4, 0)
        assert accept(listener, 4) == ([0, SOMEBODY, SOMEBODY], 0)
        assert accept(listener, 4) == -errno.EAGAIN


def test_who_has_no_room_is_refused_and_counted(listener: socket.socket) -> None:
    with connected(listener, 3, SOMEBODY), connected(listener, 1, 0):
        assert accept(listener, 8, [SOMEBODY + 1, SOMEBODY], GROUP) == ([0], 3)
    with connected(listener, 3, SOMEBODY):
        assert accept(listener, 2, [SOMEBODY]) == ([], 2)  # refusals count: others wait too
        assert accept(listener, 2, [SOMEBODY]) == ([], 1)


@pytest.mark.parametrize(
    ("gid", "groups", "let_in"),
    [
        (GROUP, [], True),
        (SOMEBODY, [OTHER_GROUP, GROUP], True),
        (SOMEBODY, [OTHER_GROUP], False),
        (SOMEBODY, [], False),
    ],
)
def test_members_of_the_group_are_not_refused(
    listener: socket.socket, gid: int, groups: list[int], let_in: bool
) -> None:
    with connected(listener, 2, SOMEBODY, gid, groups):
        found = accept(listener, 8, [SOMEBODY], GROUP)
        assert found == (([SOMEBODY] * 2, 0) if let_in else ([], 2))


def test_what_cannot_be_accepted_from_is_an_error(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        assert accept(one, 8) == -errno.EINVAL  # nobody listens
