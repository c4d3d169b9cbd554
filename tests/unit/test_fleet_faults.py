# SPDX-License-Identifier: MIT
"""What breaks on the way: nothing is lost that is not counted, and nothing is there twice."""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

from fleet import bus, schema, wire
from fleet.ask.hosts import hosts_of
from fleet.ask.store import Range, open_folder
from fleet.export.deltas import rows_of
from fleet.export.spool import Pending, Spool
from fleet.subjects import STREAM
from fleeting import Program, Server, rows
from playing import flows
from waiting import patient, until

PLAYING = str(Path(__file__).parents[1] / "playing.py")


@pytest.fixture(name="server")
def _server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "nats") as server:
        yield server


def play(tmp_path: Path, url: Any, host: Any, count: int, *more: Any) -> Program:
    spool = tmp_path / f"spool-{host}"
    spool.mkdir(exist_ok=True)
    words = [sys.executable, PLAYING, str(spool), url, host, str(count), *map(str, more)]
    return Program(tmp_path / f"{host}.log", words)


def collect(tmp_path: Path, url: Any, name: str = "one") -> Any:
    return Program.of(
        tmp_path / f"collect-{name}.log",
        "collect",
        *(str(tmp_path / "store"), "--server", url, "--interval", "0.2"),
    )


def ended(host: Program) -> str:
    assert host.process.wait(patient(60)) == 0, host.text()
    last = host.text().splitlines()[-1]
    assert last.endswith(" True"), last
    return last


def stored(tmp_path: Path) -> Counter[Any]:
    """How often each flow of each host is there."""
    return Counter((row["host"], row["cookie"]) for row in rows(tmp_path / "store", "flows"))


def each_once(tmp_path: Path, host: str, count: int) -> bool:
    return stored(tmp_path) == Counter((host, cookie) for cookie in range(count))


def give_again_soon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server gives what is not acknowledged to a collector again after 1 s, not 120."""

    async def make_stream() -> None:
        client = await nats.connect(server.url)
        await bus.ensure_stream(client.jetstream())
        await client.close()

    monkeypatch.setattr(bus, "ACK_WAIT", 1.0)
    asyncio.run(make_stream())


def test_a_server_that_dies_and_comes_back_costs_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_again_soon(server, monkeypatch)
    with collect(tmp_path, server.url), play(tmp_path, server.url, "h1", 2000) as host:
        until(lambda: stored(tmp_path), 30, "the first rows")
        server.process.kill()
        server.process.wait()
        with Server(server.directory, server.port):
            ended(host)
            until(lambda: each_once(tmp_path, "h1", 2000), 30, "every row once")


_KILLED = """
import os, signal, sys
rename, moment = os.rename, sys.argv.pop(1)
def killed(*names):
    flows = "/flows/" in str(names)
    if moment == "after" or not flows:
        rename(*names)
    if not flows:
        return
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = killed
from fleet.collect.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_collector_that_is_killed_with_a_file_loses_and_doubles_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before its file has its name, and after, when the server does not know of it yet."""
    give_again_soon(server, monkeypatch)
    words = [str(tmp_path / "store"), "--server", server.url, "--interval", "0.2"]
    command = [sys.executable, "-c", _KILLED, moment, *words]
    with play(tmp_path, server.url, "h1", 2000) as host:
        with Program(tmp_path / "killed.log", command) as killed:
            assert killed.process.wait(patient(60)) == -signal.SIGKILL
        assert bool(stored(tmp_path)) == (moment == "after")
        with collect(tmp_path, server.url), collect(tmp_path, server.url, "two"):
            ended(host)
            until(lambda: each_once(tmp_path, "h1", 2000), 60, "every row once")


def test_an_exporter_that_is_killed_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    with collect(tmp_path, server.url) as collector:
        for _ in range(4):
            with play(tmp_path, server.url, "h1", 3000) as host:
                before = host.text().count("connected")
                until(
                    functools.partial(
                        lambda one, least: one.text().count("connected") >= least, host, before
                    )
                )
                until(lambda: list((tmp_path / "spool-h1").iterdir()))
                time.sleep(0.3)
                host.process.send_signal(signal.SIGKILL)
                host.process.wait()
            spool = Spool(tmp_path / "spool-h1", 64 << 20)
            assert spool.totals().closes
            spool.close()
        with play(tmp_path, server.url, "h1", 20) as host:
            last = ended(host)
        until(lambda: f"acknowledged={stored(tmp_path).total()}," in last, 30, last)
        found = rows(tmp_path / "store", "flows")
        assert max(Counter((one["sequence"], one["cookie"]) for one in found).values()) == 1
        assert collector.stop() == 0


def test_a_host_that_was_dead_for_an_hour_tells_what_it_had_and_that_it_was_away(
    server: Server, tmp_path: Path
) -> None:
    """Its exporter was killed with a full spool. The answer says that the machine was silent."""
    (tmp_path / "spool-h1").mkdir()
    spool = Spool(tmp_path / "spool-h1", 64 << 20)

    def old(sequence: int) -> Pending:
        return Pending(sequence, wire.FLOWS, 200, batch(5000, 200, sequence, 3600))

    spool.put([old])
    spool._database.execute("UPDATE last_put SET boot = boot - 3600")
    spool.close()
    with collect(tmp_path, server.url) as collector:
        with play(tmp_path, server.url, "h1", 500) as host:
            last = ended(host)
        assert "exported=700, acknowledged=700, lost=0," in last
        assert (
            3600 <= int(last.partition("gap_ms=")[2].partition(",")[0]) // 1000 < 3600 + patient(60)
        )
        wanted = Counter(("h1", cookie) for cookie in (*range(500), *range(5000, 5200)))
        until(lambda: stored(tmp_path) == wanted, 30, "every row once")
        until(lambda: rows(tmp_path / "store", "account"), 30, "its account")
        assert collector.stop() == 0
    hours = {path.name for path in (tmp_path / "store" / "flows").iterdir()}
    found_rows = rows(tmp_path / "store", "flows")
    assert hours == {schema.hour_name(row["last_ns"]) for row in found_rows} and len(hours) > 1
    now = time.time_ns()
    with open_folder(tmp_path / "store", Range(now - schema.HOUR_NS, now)) as opened:
        [found] = hosts_of(opened)
    assert found.name == "h1" and found.silent_s > 3500


def test_what_has_no_room_is_lost_and_counted(tmp_path: Path) -> None:
    """The server is away; the spool is small."""
    with play(tmp_path, "nats://127.0.0.1:9", "h1", 20_000, 0.02, 20_000) as host:
        until(lambda: "given" in host.text())
        host.process.send_signal(signal.SIGTERM)
        last = ended(host)
    assert "exported=20000, acknowledged=0," in last and "lost=0," not in last


def publish(url: Any, *messages: Any) -> None:
    async def run() -> None:
        client = await nats.connect(url)
        jetstream = client.jetstream()
        await bus.ensure_stream(jetstream)
        for subject, payload in messages:
            await jetstream.publish(subject, payload)
        await client.close()

    asyncio.run(run())


BOOT = uuid.UUID(int=7).bytes


def batch(first: Any, count: int, sequence: int = 1, ago_s: float = 0.0) -> Any:
    made = rows_of(flows(first, count))
    made["first_ns"] = made["last_ns"] = time.time_ns() - int(ago_s * 1e9)
    return wire.encode_flows(BOOT, sequence, made, {})


def test_a_batch_that_is_told_again_is_not_stored_again(server: Server, tmp_path: Path) -> None:
    again = ("flows.h1", batch(0, 10))
    publish(server.url, again, again)
    with collect(tmp_path, server.url) as collector:
        until(lambda: each_once(tmp_path, "h1", 10))
        publish(server.url, again, ("flows.h1", batch(10, 5, 2)))
        until(lambda: each_once(tmp_path, "h1", 15))
        assert collector.stop() == 0
    publish(server.url, again, ("flows.h1", batch(15, 5, 3)))
    with collect(tmp_path, server.url):
        until(lambda: each_once(tmp_path, "h1", 20))


def test_the_subject_says_whose_a_batch_is(server: Server, tmp_path: Path) -> None:
    """Two hosts with the same boot and sequence are two."""
    publish(server.url, ("flows.h1", batch(0, 3)), ("flows.h2.example", batch(0, 3)))
    with collect(tmp_path, server.url):
        until(lambda: stored(tmp_path).total() == 6)
    assert {host for host, _ in stored(tmp_path)} == {"h1", "h2.example"}


def test_what_is_no_batch_is_counted_and_given_up(server: Server, tmp_path: Path) -> None:
    nonsense = [b"", b"PHF2", b"x" * 4000, batch(0, 3)[:-4], batch(0, 3) + b"x"]
    wrong = [("flows.h1", one) for one in nonsense] + [("procs.h1", batch(0, 3))]
    publish(server.url, *wrong, ("flows.h1", batch(0, 3)))
    with collect(tmp_path, server.url) as collector:
        until(lambda: each_once(tmp_path, "h1", 3))
        assert collector.stop() == 0
        assert "3 rows collected, 6 malformed messages" in collector.text()

    async def left() -> int:
        client = await nats.connect(server.url)
        info = await client.jetstream().stream_info(STREAM)
        await client.close()
        return info.state.messages

    assert asyncio.run(left()) == 0


def test_small_batches_that_are_large_inside_do_not_fill_memory(
    server: Server, tmp_path: Path
) -> None:
    """A hostile host sends 8 kB that unpack to 8 MB; the collector has read 150 of them at once."""
    names = dict.fromkeys(range(1, 1900), "x" * 4200)

    def large(sequence: int) -> bytes:
        made = rows_of(flows(sequence, 1))
        made["first_ns"] = made["last_ns"] = time.time_ns()
        return wire.encode_flows(BOOT, sequence, made, names)

    publish(server.url, *(("flows.h1", large(sequence)) for sequence in range(150)))
    with collect(tmp_path, server.url) as collector:
        until(lambda: each_once(tmp_path, "h1", 150), 60, "every row once")
        told = Path(f"/proc/{collector.process.pid}/status").read_text()
        assert int(told.partition("VmHWM:")[2].split()[0]) < 1 << 20  # KiB
        assert collector.stop() == 0


def test_a_damaged_file_stops_a_collector_until_it_is_moved_away(
    server: Server, tmp_path: Path
) -> None:
    """What its batches are cannot be read, so anything might be twice."""
    ago = time.time() % 3600 + 1800  # the same hour for both
    publish(server.url, ("flows.h1", batch(0, 3, 1, ago)))
    with collect(tmp_path, server.url) as collector:
        until(lambda: each_once(tmp_path, "h1", 3))
        assert collector.stop() == 0
    [part] = (tmp_path / "store" / "flows").glob("hour=*/part-*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    publish(server.url, ("flows.h1", batch(3, 4, 2, ago)))
    with collect(tmp_path, server.url) as collector:
        collector.wait_for(f"{part} is no file of a collector")
        assert "move it away" in collector.text() and "Traceback" not in collector.text()
        part.unlink()
        until(lambda: stored(tmp_path) == Counter(("h1", cookie) for cookie in range(3, 7)))
        assert collector.stop() == 0


def test_rows_go_to_their_own_hour_and_not_to_one_that_nobody_wants(
    server: Server, tmp_path: Path
) -> None:
    """A host that was cut off for hours, one whose clock is 5 s ahead, and two that are wrong."""
    day = 86400.0
    ages = {"silent": 3 * 3600.0, "ahead": -5.0, "future": -2 * day, "ancient": 40 * day}
    publish(server.url, *((f"flows.{name}", batch(0, 2, ago_s=age)) for name, age in ages.items()))
    publish(server.url, ("flows.last", batch(0, 2)))
    with collect(tmp_path, server.url) as collector:
        until(lambda: any(host == "last" for host, _ in stored(tmp_path)))
        assert collector.stop() == 0
        assert "4 rows out of time" in collector.text()
    assert {host for host, _ in stored(tmp_path)} == {"silent", "ahead", "last"}
    found = rows(tmp_path / "store", "flows")
    hours = {schema.hour_name(row["last_ns"]) for row in found}
    assert {path.name for path in (tmp_path / "store/flows").iterdir()} == hours
    assert len(hours) > 1
