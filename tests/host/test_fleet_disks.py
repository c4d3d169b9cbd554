# SPDX-License-Identifier: MIT
"""Disks that are full: the spool's, and the collector's. Root, for a small tmpfs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleeting import Program, Server, rows
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="mounts a tmpfs")
PLAYING = str(Path(__file__).parents[1] / "playing.py")


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Any]:
    """A disk of 2 MiB, and the file that fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    path = disk / "ballast"
    with pytest.raises(OSError), open(path, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


@pytest.fixture(name="server")
def _server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "nats") as server:
        yield server


def play(tmp_path: Path, url: Any, spool: Any, count: int, pause: Any) -> Program:
    words = [sys.executable, PLAYING, str(spool), url, "h1", str(count), str(pause)]
    return Program(tmp_path / "h1.log", words)


def collect(tmp_path: Path, url: Any, store: Any) -> Any:
    words = (str(store), "--server", url, "--interval", "0.2")
    return Program.of(tmp_path / "collect.log", "collect", *words)


def each_once(store: Any, count: int) -> bool:
    found = Counter(row["cookie"] for row in rows(store, "flows"))
    return found == Counter(range(count))


def test_what_a_full_disk_cannot_spool_waits_and_goes_when_there_is_room(
    server: Server, disk: Any, tmp_path: Path
) -> None:
    spool = disk / "spool"
    spool.mkdir()
    store = tmp_path / "store"
    with (
        collect(tmp_path, server.url, store) as collector,
        play(tmp_path, server.url, spool, 2000, 0.1) as host,
    ):
        collector.wait_for("connected")
        host.wait_for("connected")
        ballast = fill(disk)
        host.wait_for("takes nothing")
        host.wait_for("all given")
        ballast.unlink()
        host.wait_for("takes batches again")
        assert host.process.wait(patient(60)) == 0, host.text()
        last = host.text().splitlines()[-1]
        assert "exported=2000, acknowledged=2000, lost=0," in last and last.endswith(" True")
        until(lambda: each_once(store, 2000), 30, "every row once")


def test_a_collector_whose_disk_is_full_loses_nothing(
    server: Server, disk: Any, tmp_path: Path
) -> None:
    spool, store = tmp_path / "spool", disk / "store"
    spool.mkdir()
    with collect(tmp_path, server.url, store) as collector:
        collector.wait_for("connected")
        ballast = fill(disk)
        with play(tmp_path, server.url, spool, 2000, 0.02) as host:
            assert host.process.wait(patient(60)) == 0, host.text()
        collector.wait_for("No space left")
        assert not list(store.rglob("*.parquet"))
        ballast.unlink()
        until(lambda: each_once(store, 2000), 60, "every row once")
        assert not list(store.rglob(".part-*"))
        assert collector.stop() == 0


def test_a_server_whose_disk_was_full_takes_what_hosts_kept_when_it_is_started_again(
    disk: Any, tmp_path: Path
) -> None:
    """With room again it goes on to take nothing, until it is started again."""
    spool, store, own = (tmp_path / name for name in ("spool", "store", "nats"))
    spool.mkdir()
    own.mkdir()
    (own / "store").symlink_to(disk)
    with Server(own) as server, collect(tmp_path, server.url, store) as collector:
        collector.wait_for("connected")
        ballast = fill(disk)
        with play(tmp_path, server.url, spool, 2000, 0.02) as host:
            host.wait_for("the server: nats: ", 60)
            assert "no space left" in server.text() and not rows(store, "flows")
            ballast.unlink()
            server.stop()
            with Server(own, server.port):
                assert host.process.wait(patient(90)) == 0, host.text()
                last = host.text().splitlines()[-1]
                assert "exported=2000, acknowledged=2000, lost=0," in last
                until(lambda: each_once(store, 2000), 60, "every row once")
                assert collector.stop() == 0
