# SPDX-License-Identifier: MIT
"""Three servers by the configuration in docs/FLEET.md: TLS, keys, a stream on all of them.

One is killed at each moment in turn; nothing is lost and nothing is there twice. Played with
Debian's own nats-server and with upstream's.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nats
import pytest

from fleet import bus
from fleet.options import FleetServer as At
from fleet.subjects import STREAM
from fleeting import Program, certificate, free_port, nats_server, rows
from nlproto.errors import Error
from waiting import patient, until

ROOT = Path(__file__).parents[2]
PLAYING = str(ROOT / "tests" / "playing.py")
HOSTS, EACH = ("h1", "h2"), 1500


def debian_server() -> str:
    """Debian's: installed, or unpacked from its package."""
    installed = Path("/usr/sbin/nats-server")
    if installed.exists():
        return str(installed)
    cache = Path.home() / ".cache" / "packet-hunter" / "nats-server-debian"
    program = cache / "usr" / "sbin" / "nats-server"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "nats-server"], cwd=cache, check=True)
        [package] = cache.glob("nats-server_*.deb")
        subprocess.run(["dpkg", "-x", str(package), str(cache)], check=True)
    return str(program)


def documented() -> str:
    """The configuration that docs/FLEET.md shows, with its cluster."""
    text = (ROOT / "docs" / "FLEET.md").read_text()
    blocks = re.findall(r"^(?:    .*\n|\n)+", text, re.MULTILINE)
    wanted = [block for block in blocks if "jetstream {" in block or "cluster {" in block]
    assert len(wanted) == 2
    return "".join(wanted)


class Cluster:
    """Three servers on loopback."""

    def __init__(self, directory: Path, program: str, users: list[str]) -> None:
        self.ports = [free_port() for _ in range(3)]
        self.urls = [f"tls://127.0.0.1:{port}" for port in self.ports]
        routes = [free_port() for _ in range(3)]
        self.directory, self.program = directory, program
        made, key = certificate(directory)
        self.ca = str(made)
        for number in range(3):
            own = directory / f"nats{number + 1}"
            own.mkdir()
            others = [f'"tls://127.0.0.1:{one}"' for one in routes if one != routes[number]]
            text = documented()
            for there, here in (
                (r'listen: "0.0.0.0:4222"', f'listen: "127.0.0.1:{self.ports[number]}"'),
                (r'listen: "0.0.0.0:6222"', f'listen: "127.0.0.1:{routes[number]}"'),
                (r'"/var/lib/nats"', f'"{own}/store"'),
                (r"max_file_store: 100GB", "max_file_store: 1GB"),
                (r'"/etc/nats/server.pem"', f'"{made}"'),
                (r'"/etc/nats/ca.pem"', f'"{made}"'),
                (r'"/etc/nats/server.key"', f'"{key}"'),
                (r"server_name: nats1", f"server_name: nats{number + 1}"),
                (r"routes: \[.*\]", f"routes: [{', '.join(others)}]"),
                (r"\{ nkey: UA\.\.\..*", "\n".join(users)),
            ):
                text, count = re.subn(there, here.replace("\\", ""), text)
                assert count, there
            (own / "nats.conf").write_text(text)
        self.servers: list[Program | None] = [None] * 3

    def start(self, number: int) -> None:
        own = self.directory / f"nats{number + 1}"
        command = [self.program, "-c", str(own / "nats.conf")]
        self.servers[number] = Program(own / "log", command, cwd="/")

    def kill(self, number: int) -> None:
        server = self.servers[number]
        assert server is not None
        server.process.kill()
        server.process.wait()

    def __enter__(self) -> Cluster:
        for number in range(3):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            if server is not None:
                server.__exit__()

    async def state(self, key: Path) -> tuple[int, str]:
        """(Copies that are up to date, the leader of the stream)."""
        client = await bus.connect(At(tuple(self.urls), str(key), self.ca), "collector", _hear)
        try:
            info = await client.jetstream(timeout=5.0).stream_info(STREAM)
        finally:
            await client.close()
        assert info.cluster is not None
        whole = [one for one in info.cluster.replicas or [] if one.current]
        return 1 + len(whole), str(info.cluster.leader)


async def _hear(_: Exception) -> None:
    pass


def _key(path: Path, program: str, *arguments: str) -> str:
    run = [sys.executable, "-I", "-m", f"fleet.{program}", "--make-nkey", "--nkey", str(path)]
    return subprocess.run([*run, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("whose", ["debian", "upstream"])
def test_three_servers_lose_one_after_the_other_and_no_row(tmp_path: Path, whose: str) -> None:
    if whose == "debian" and not shutil.which("apt-get"):
        pytest.fail("Debian's nats-server comes from apt-get")
    users = [_key(tmp_path / f"{name}.nk", "export", "--host", name) for name in HOSTS]
    collector_key = tmp_path / "collector.nk"
    users.append(_key(collector_key, "collect"))
    program = debian_server() if whose == "debian" else nats_server()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(tmp_path, program, users))
        store = tmp_path / "store"
        every = [word for url in cluster.urls for word in ("--server", url)]
        collector = stack.enter_context(
            Program.of(tmp_path / "collect.log", "collect", str(store), *every, "--ca", cluster.ca,
                       "--nkey", str(collector_key), "--interval", "0.2", "--replicas", "3")
        )  # fmt: skip

        def copies() -> tuple[int, str]:
            try:
                return asyncio.run(cluster.state(collector_key))
            except (AssertionError, nats.errors.Error, Error, TimeoutError):
                return 0, ""

        until(lambda: copies()[0] == 3, 120, "a stream on three servers")
        playing = []
        for name in HOSTS:
            (tmp_path / name).mkdir()
            way = f"{'|'.join(cluster.urls)},{tmp_path / name}.nk,{cluster.ca}"
            words = [sys.executable, PLAYING, str(tmp_path / name), way, name, str(EACH)]
            playing.append(stack.enter_context(Program(tmp_path / f"{name}.log", words)))
        for _ in range(3):
            leader = copies()[1]
            number = int(leader.removeprefix("nats") or 1) - 1
            cluster.kill(number)
            time.sleep(2)
            cluster.start(number)
            until(lambda: copies()[0] == 3, 120, "three copies again")
        for one in playing:
            assert one.process.wait(patient(120)) == 0, one.text()
        wanted = Counter((name, cookie) for name in HOSTS for cookie in range(EACH))

        def stored() -> Counter[tuple[str, int]]:
            return Counter((row["host"], row["cookie"]) for row in rows(store, "flows"))

        until(lambda: stored() == wanted, 60, "every row once")
        assert collector.stop() == 0, collector.text()
