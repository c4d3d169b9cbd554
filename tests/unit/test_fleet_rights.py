# SPDX-License-Identifier: MIT
"""TLS, and a key for each host that may publish as this host and do nothing else."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fleet import bus
from fleet.options import FleetServer as At
from fleet.subjects import STREAM
from fleeting import Program, Server, certificate, rows, secured
from nlproto.errors import Error
from waiting import patient, until

PLAYING = str(Path(__file__).parents[1] / "playing.py")


def key(tmp_path: Path, program: Any, name: Any, *arguments: Any) -> Any:
    path = tmp_path / f"{name}.nk"
    run = [sys.executable, "-I", "-m", f"fleet.{program}", "--make-nkey", "--nkey", str(path)]
    ended = subprocess.run([*run, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = subprocess.run([*run, *arguments], capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    return ended.stdout


class Secured(NamedTuple):
    server: Server
    tls: str
    ca: str


@pytest.fixture(name="fleet")
def _fleet(tmp_path: Path) -> Iterator[Secured]:
    users = [key(tmp_path, "export", name, "--host", name) for name in ("h1", "h2.example")]
    users.append(key(tmp_path, "collect", "collector"))
    made, private = certificate(tmp_path)
    with Server(tmp_path / "nats", config=secured(made, private, users)) as server:
        yield Secured(server, server.url.replace("nats:", "tls:"), str(made))


def test_hosts_export_by_their_keys_and_collectors_collect(fleet: Secured, tmp_path: Path) -> None:
    with Program.of(
        tmp_path / "collect.log",
        "collect",
        *(str(tmp_path / "store"), "--server", fleet.tls, "--ca", fleet.ca),
        *("--nkey", str(tmp_path / "collector.nk"), "--interval", "0.2"),
    ) as collector:
        collector.wait_for("connected")
        for name in ("h1", "h2.example"):
            spool = tmp_path / name
            spool.mkdir()
            way = f"{fleet.tls},{tmp_path / name}.nk,{fleet.ca}"
            words = [sys.executable, PLAYING, str(spool), way, name, "200"]
            with Program(tmp_path / f"{name}.log", words) as host:
                assert host.process.wait(patient(60)) == 0, host.text()
        until(lambda: len(rows(tmp_path / "store", "flows")) == 400, 30, "400 rows")
        assert {row["host"] for row in rows(tmp_path / "store", "flows")} == {"h1", "h2.example"}


def test_what_a_host_may_not_is_refused_and_stored_nowhere(fleet: Secured, tmp_path: Path) -> None:
    told = []

    async def hear(error: Any) -> None:
        told.append(str(error))

    def at(name: Any, ca: Any = fleet.ca, url: Any = fleet.tls) -> At:
        return At((url,), str(tmp_path / f"{name}.nk"), ca)

    async def attempt() -> Any:
        collector = await bus.connect(at("collector"), "collector", hear)
        await bus.ensure_stream(collector.jetstream())
        host = await bus.connect(at("h1"), "h1", hear)
        jetstream = host.jetstream(timeout=1.0)
        await jetstream.publish("flows.h1", b"mine", stream=STREAM)
        forged = ("flows.h2.example", "procs.h2.example", "account.h2.example", "flows.h1.more")
        for subject in (*forged, f"$JS.API.STREAM.DELETE.{STREAM}"):
            with pytest.raises(bus.FAILURES):
                await jetstream.publish(subject, b"forged")
        for subject in ("flows.>", "_INBOX_h2_example.>", "_INBOX_collector.>", ">"):
            await host.subscribe(subject)
        await host.flush()
        seen = (await collector.jetstream().stream_info(STREAM)).state.messages
        for client in (host, collector):
            await client.close()
        return seen

    assert asyncio.run(attempt()) == 1
    text = "\n".join(told).lower()
    for refused in ("flows.h2.example", "procs.h2.example", "account.h2.example", "flows.h1.more"):
        assert f'publish to "{refused}"' in text
    for refused in ("flows.>", "_inbox_h2_example.>", "_inbox_collector.>", ">"):
        assert f'subscription to "{refused}"' in text


def test_who_is_not_known_is_not_let_in(fleet: Secured, tmp_path: Path) -> None:
    key(tmp_path, "export", "stranger", "--host", "h1")
    stranger = At((fleet.tls,), str(tmp_path / "stranger.nk"), fleet.ca)
    nobody = At((fleet.tls,), None, fleet.ca)
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")[0]
    elsewhere = At((fleet.tls,), str(tmp_path / "h1.nk"), str(other))

    async def hear(error: Any) -> None:
        pass

    for server, why in ((stranger, "authorization"), (nobody, ""), (elsewhere, "certificate")):
        with pytest.raises(Error, match=f"(?i){why}"):
            asyncio.run(bus.connect(server, "h1", hear))
