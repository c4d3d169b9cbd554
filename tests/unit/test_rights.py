# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from daemon.system.rights import Peer, group_id, peer_of


def test_the_peer_is_known_by_pid_uid_and_all_its_groups() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = peer_of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert peer.groups == frozenset(os.getgroups()) | {os.getgid()}


@pytest.mark.parametrize(
    ("uid", "groups", "everything"),
    [(0, set(), True), (1000, {5, 77}, True), (1000, {5}, False), (1000, set(), False)],
)
def test_root_and_the_group_see_everything(uid: int, groups: Any, everything: bool) -> None:
    assert Peer(1, uid, frozenset(groups)).sees_everything(77) is everything


def test_without_the_group_only_root_sees_everything() -> None:
    assert not Peer(1, 1000, frozenset({77})).sees_everything(None)
    assert group_id("no-such-group-here") is None
    assert group_id("a\0b") is None
