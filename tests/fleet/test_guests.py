# SPDX-License-Identifier: MIT
"""Two machines with kernels of their own: each connection has both its processes, none wrong.

The guests have a wire between them, and reach the server on this machine's loopback. The truth is
what their processes wrote down themselves.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fleeting import Program, Server, ends_by_way, free_port
from waiting import until

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "vm"))

from vmtest.build import build_module  # noqa: E402
from vmtest.guest import BOOT_SECONDS, Guest  # noqa: E402
from vmtest.kernels import KERNELS, cache_directory, unpack  # noqa: E402

EACH = 15
PORT = 7000
PATIENCE = 400.0


def _guests(stack: contextlib.ExitStack, engine: str, server: str) -> list[Guest]:
    kernel = unpack(KERNELS[os.environ.get("PACKET_HUNTER_KERNEL", "6.1")], cache_directory())
    module = build_module(ROOT, kernel, cache_directory())
    wire = free_port()
    made = []
    for number, side in ((1, f"listen=127.0.0.1:{wire}"), (2, f"connect=127.0.0.1:{wire}")):
        program = [sys.executable, str(Path(__file__).with_name("guest.py"))]
        command = ["env", f"PACKET_HUNTER_MODULE={module}", *program, str(number), engine, server]
        nets = (
            "-netdev user,id=up", "-device virtio-net-pci,netdev=up,mac=52:54:00:00:0%d:aa",
            f"-netdev socket,id=wire,{side}",
            "-device virtio-net-pci,netdev=wire,mac=52:54:00:00:0%d:bb",
        )  # fmt: skip
        options = [one % number if "%d" in one else one for one in nets]
        made.append(stack.enter_context(Guest(kernel, command, directory=ROOT, qemu=options)))
    for number, one in enumerate(made, 1):
        assert one.receive(BOOT_SECONDS) == {"ready": str(number)}, one.printed(60)
    return made


def _told(guest: Guest, side: str) -> dict[tuple[str, str], int]:
    guest.send({"told": side})
    return {(local, remote): pid for local, remote, pid in guest.receive(PATIENCE)["told"]}


@pytest.mark.parametrize("engine", ["module", "ebpf"])
def test_every_connection_of_two_guests_has_both_its_processes(tmp_path: Path, engine: str) -> None:
    since = time.time_ns() - 10**9
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path / "nats"))
        store = tmp_path / "store"
        collector = stack.enter_context(
            Program.of(tmp_path / "collect.log", "collect", str(store), "--server", server.url,
                       "--interval", "1")
        )  # fmt: skip
        guests = _guests(stack, engine, f"nats://10.0.2.2:{server.port}")
        for guest in guests:
            guest.send({"serve": PORT})
            assert guest.receive(PATIENCE) == {"serving": True}
        for guest, other in zip(guests, ("10.99.0.2", "10.99.0.1"), strict=True):
            guest.send({"ask": [other, PORT, EACH]})
            assert guest.receive(PATIENCE) == {"asked": True}
        asked = {
            (f"g{number}", *way): pid
            for number, guest in enumerate(guests, 1)
            for way, pid in _told(guest, "ask").items()
        }
        answering = {
            (f"g{number}", *way): pid
            for number, guest in enumerate(guests, 1)
            for way, pid in _told(guest, "serve").items()
        }
        assert len(asked) == len(answering) == 2 * 2 * EACH

        def all_there() -> bool:
            return asked.keys() <= ends_by_way(store, since, PORT).keys()

        until(all_there, PATIENCE, "both ends of all")
        for guest in guests:
            guest.send({"stop": True})
            ended: dict[str, Any] = guest.receive(PATIENCE)
            assert ended["ended"] == 0, ended["log"]
        assert collector.stop() == 0, collector.text()
    found = ends_by_way(store, since, PORT, whole=True)
    assert found.keys() == asked.keys()
    for (name, local, remote), pid in asked.items():
        client_pid, server_name, server_pid = found[name, local, remote]
        assert client_pid == pid
        assert server_pid == answering[server_name, remote, local]
