# SPDX-License-Identifier: MIT
"""Three machines, as far as a kernel can be three: each connection has both its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.ask.hosts import hosts_of
from fleet.ask.store import Range, open_folder
from fleeting import ASK, SERVE, Program, Server, ends_by_way, told
from waiting import until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")

NAMES = ("m1", "m2", "m3")
EACH = 10
"""Connections from each machine to each other one, and to itself over loopback."""
PORT = 7000


def run(*command: Any) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Machine:
    """Its own network, processes and /proc; a daemon and an exporter.

    Engine packet alone is so confined: a program of the kernel's sees all of it (tests/fleet has
    guests for that).
    """

    def __init__(self, number: int, name: Any, directory: Any, hub: Any, url: Any) -> None:
        self.name, self.address = name, f"10.99.0.{number}"
        self.directory = directory / name
        self.directory.mkdir()
        self.truth = {side: self.directory / f"{side}.truth" for side in ("serve", "ask")}
        apart = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self.outer = subprocess.Popen([*apart, "sleep", "1000"])
        self.init = until(lambda: self._child(), 20, "a machine")
        device = f"phf{os.getpid() % 10000}{number}"
        run("ip", "link", "add", device, "netns", hub, "type", "veth", "peer", "name", device)
        run("ip", "-n", hub, "link", "set", device, "master", "bridge", "up")
        run("ip", "link", "set", device, "netns", str(self.init))
        self.enter("ip", "address", "add", f"{self.address}/24", "dev", device).wait(20)
        self.enter("ip", "link", "set", device, "up").wait(20)
        self.enter("ip", "link", "set", "lo", "up").wait(20)
        path = str(self.directory / "daemon.sock")
        daemon = [sys.executable, *("-I", "-m", "daemon", "--engine", "packet", "--foreground")]
        self.daemon = Program(
            self.directory / "daemon.log", self._inside([*daemon, "--socket", path]), cwd="/"
        )
        self.daemon.wait_for("serving")
        words = ("--socket", path, "--spool", str(self.directory / "spool"), "--host", name)
        self.exporter = Program.of(
            self.directory / "export.log", "export", *words, "--server", url, "--interval", "1"
        )
        # reads the daemon, which tells nobody what was before
        self.exporter.wait_for("engine packet")

    def _child(self) -> Any:
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text()
        return int(children.split()[0]) if children else None

    def _inside(self, command: Any) -> list[Any]:
        return ["nsenter", "--target", str(self.init), "--net", "--pid", "--mount", *command]

    def enter(self, *command: Any, **options: Any) -> Any:
        return subprocess.Popen(self._inside(list(command)), cwd="/", **options)

    def python(self, code: Any, side: Any, *words: Any) -> Any:
        command = [sys.executable, "-c", code, str(self.truth[side]), *map(str, words)]
        return self.enter(*command, stdin=subprocess.PIPE)

    def told(self, side: str) -> dict[tuple[str, str], int]:
        return told(self.truth[side])

    def close(self) -> None:
        """The exporter sends what it has; the daemon ends with its machine."""
        assert self.exporter.stop() == 0, self.exporter.text()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Any, ...]]:
    hub = f"phf-hub-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", hub)
        stack.callback(run, "ip", "netns", "delete", hub)
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        server = stack.enter_context(Server(tmp_path / "nats"))
        made = []
        for number, name in enumerate(NAMES, 1):
            made.append(Machine(number, name, tmp_path, hub, server.url))
            stack.callback(made[-1].outer.wait)
            stack.callback(made[-1].outer.kill)
        yield made, tmp_path / "store", server.url


def test_every_connection_of_three_machines_has_both_its_processes(
    machines: tuple[Any, ...], tmp_path: Path
) -> None:
    made, store, url = machines
    since = time.time_ns()
    with Program.of(tmp_path / "collect.log", "collect", str(store), "--server", url,
                    "--interval", "1") as collector:  # fmt: skip
        for one in made:
            one.python(SERVE, "serve", PORT)
        until(lambda: all("ready" in _text(one.truth["serve"]) for one in made), 30, "servers")
        asking = []
        for one in made:
            others = [other.address for other in made if other is not one]
            asking.append(one.python(ASK, "ask", EACH, PORT, "127.0.0.1", *others))
        until(lambda: all("done" in _text(one.truth["ask"]) for one in made), 60, "clients")
        wanted = {(one.name, *way): pid for one in made for way, pid in one.told("ask").items()}
        assert len(wanted) == 3 * 3 * EACH

        def missing() -> set[tuple[str, str, str]]:
            return wanted.keys() - ends_by_way(store, since, PORT).keys()

        try:
            until(lambda: not missing(), 60, "both ends of all")
        except pytest.fail.Exception:
            pytest.fail(f"without both ends: {missing()}")
        for one in asking:
            one.stdin.close()
            one.wait()
        for one in made:
            one.close()
        assert collector.stop() == 0, collector.text()
    found = ends_by_way(store, since, PORT, whole=True)
    answering = {
        (one.name, local, remote): pid
        for one in made
        for (local, remote), pid in one.told("serve").items()
    }
    for (name, local, remote), pid in wanted.items():
        client_pid, server_name, server_pid = found[name, local, remote]
        assert client_pid == pid
        assert server_pid == answering[server_name, remote, local]
    with open_folder(store, Range(since, time.time_ns())) as opened:
        assert {one.name for one in hosts_of(opened)} == set(NAMES)


def _text(path: Any) -> Any:
    return path.read_text() if path.exists() else ""
