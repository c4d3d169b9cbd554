# SPDX-License-Identifier: MIT
"""Files and sockets are made in one directory, which stays the same whatever is renamed."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.system.config import Config
from daemon.system.directory import HeldDirectory
from daemon.system.metrics import Metrics
from daemon.system.socketfile import SocketFile
from nlproto.errors import Error


def _mode(path: Any) -> Any:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture(name="swapped")
def _swapped(tmp_path: Path) -> Iterator[tuple[Any, ...]]:
    """A directory whose place another one takes while it is open; (Place, path, old directory)."""
    (tmp_path / "run").mkdir()
    with HeldDirectory(str(tmp_path / "run" / "x"), "/none", 0o755) as place:
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
        yield place, tmp_path / "elsewhere", tmp_path / "moved"


def test_what_is_made_is_made_in_the_directory_that_was_opened(swapped: tuple[Any, ...]) -> None:
    place, elsewhere, moved = swapped
    os.close(place.open_file(0o640, ".lock"))
    with socket.socket(socket.AF_UNIX) as listener:
        mine = place.bind(listener, 0o666)
        assert sorted(os.listdir(moved)) == ["x", "x.lock"]
        place.unlink(mine)
    place.rename("y", ".lock")
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize("umask", [0o077, 0o022, 0])
def test_a_socket_has_its_mode_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with SocketFile(str(tmp_path / "daemon.sock")):
            assert _mode(tmp_path / "daemon.sock") == 0o666
            assert _mode(tmp_path / "daemon.sock.lock") == 0o600
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_link_in_place_of_socket_or_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    target.chmod(0o600)
    (tmp_path / "a.sock").symlink_to(target)
    (tmp_path / "b.sock.lock").symlink_to(target)
    os.link(target, tmp_path / "c.sock.lock")
    os.mkfifo(tmp_path / "d.sock.lock")
    for name in "abcd":
        with pytest.raises(Error), SocketFile(str(tmp_path / f"{name}.sock")):
            pass
    assert target.read_text() == "precious"
    assert _mode(target) == 0o600


def test_a_link_that_takes_the_sockets_place_is_neither_changed_nor_removed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    with SocketFile(str(tmp_path / "daemon.sock")):
        (tmp_path / "daemon.sock").unlink()
        (tmp_path / "daemon.sock").symlink_to(target)
    assert (tmp_path / "daemon.sock").is_symlink()
    assert target.read_text() == "precious"


def test_no_directory_is_made_but_ones_own(tmp_path: Path) -> None:
    with pytest.raises(Error, match="there is no directory"):
        with SocketFile(str(tmp_path / "none" / "daemon.sock")):
            pass
    assert os.listdir(tmp_path) == []
    own = str(tmp_path / "own")
    before = os.umask(0o077)
    try:
        with HeldDirectory(f"{own}/x", own, 0o755):
            assert _mode(own) == 0o755
    finally:
        os.umask(before)
    with pytest.raises(FileNotFoundError):
        HeldDirectory(f"{own}/deeper/x", own, 0o755)
    with pytest.raises(FileNotFoundError):
        HeldDirectory(f"{own}/a/b/x", f"{own}/a/b", 0o755)


def test_metrics_never_remove_what_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    path.write_text("precious")
    with pytest.raises(Error, match="no socket"), Metrics(Config(metrics=str(path)), dict):
        pass
    assert path.read_text() == "precious"


def test_the_metrics_socket_is_for_owner_and_group_and_goes_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    before = os.umask(0o077)
    try:
        with Metrics(Config(metrics=str(path)), dict):
            assert _mode(path) == 0o660
    finally:
        os.umask(before)
    assert not path.exists()
