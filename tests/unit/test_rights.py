# SPDX-License-Identifier: MIT
import os
import socket
import stat

import pytest

from daemon.__main__ import others_can_write
from daemon.rights import Peer, group_id, peer_of


def test_the_peer_is_known_by_pid_uid_and_all_its_groups():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = peer_of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert peer.groups == frozenset(os.getgroups()) | {os.getgid()}


@pytest.mark.parametrize(
    ("uid", "groups", "everything"),
    [(0, set(), True), (1000, {5, 77}, True), (1000, {5}, False), (1000, set(), False)],
)
def test_root_and_the_group_see_everything(uid, groups, everything):
    assert Peer(1, uid, frozenset(groups)).sees_everything(77) is everything


def test_without_the_group_only_root_sees_everything():
    assert not Peer(1, 1000, frozenset({77})).sees_everything(None)
    assert group_id("no-such-group-here") is None


def test_a_directory_of_root_alone_is_safe():
    assert not others_can_write("/usr", {})


def test_a_directory_for_all_is_unsafe_although_sticky():
    assert os.stat("/tmp").st_mode & stat.S_ISVTX
    assert others_can_write("/tmp", {})


@pytest.mark.skipif(os.getuid() != 0, reason="changes owners: needs root")
def test_the_owner_must_be_root_or_the_user_behind_sudo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("project")
    os.chown(directory, 1234, 1234)
    os.chmod(directory, 0o755)
    assert others_can_write(str(directory), {})
    assert others_can_write(str(directory), {"SUDO_UID": "999"})
    assert not others_can_write(str(directory), {"SUDO_UID": "1234", "SUDO_GID": "1234"})
    os.chmod(directory, 0o775)
    assert not others_can_write(str(directory), {"SUDO_UID": "1234", "SUDO_GID": "1234"})
    assert others_can_write(str(directory), {"SUDO_UID": "1234", "SUDO_GID": "5"})
    os.chmod(directory, 0o777)
    assert others_can_write(str(directory), {"SUDO_UID": "1234", "SUDO_GID": "1234"})
