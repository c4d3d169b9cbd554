# SPDX-License-Identifier: MIT
"""A host without a daemon: the real exporter, fed with flows that are known.

    playing.py SPOOL URL HOST FLOWS [INTERVAL [SPOOL_BYTES]]

FLOWS flows come, some each interval, each with a cookie of its own. Then it waits until all of them
are acknowledged, and ends. The account stands on its last line.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time

import numpy as np

from fleet.export.exporter import Exporter
from fleet.export.source import FlowSource
from fleet.export.spool import Spool
from fleet.options import FleetServer
from nlproto.records.clock import Clock
from nlproto.tables.flows import FLOW, pack_address

__all__ = ["flows"]


def flows(first: int, count: int, **fields: object) -> np.ndarray:
    """FLOWs with the cookies from `first` on."""
    made = np.zeros(count, FLOW)
    made["cookie"] = np.arange(first, first + count)
    made["tgid"], made["start_ns"], made["uid"], made["comm"] = 100, 5_000_000_000, 1000, b"played"
    made["netns"], made["family"], made["proto"], made["how"] = 4026531840, 2, 6, 1
    for name in ("laddr", "raddr"):
        made[name] = np.frombuffer(pack_address(f"10.0.0.{len(name)}")[1], np.uint64)
    made["lport"], made["rport"] = 40000 + made["cookie"] % 20000, 5432
    made["packets_out"], made["bytes_out"] = 1, 60
    made["first_ns"] = made["last_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    for name, value in fields.items():
        made[name] = value
    return made


async def _play(
    exporter: Exporter, source: FlowSource, spool: Spool, count: int, pause: float
) -> None:
    running = asyncio.create_task(exporter.run())
    given, each = 0, max(1, count // 20)
    while given < count and not running.done():
        with source.lock:
            source.deltas.add(flows(given, min(each, count - given)), Clock.now())
        given += each
        await asyncio.sleep(pause)
    print("all given", flush=True)
    while not running.done():
        await asyncio.sleep(pause)
        totals = spool.totals()
        if not len(source.deltas) and not totals.spooled and totals.exported:
            exporter.stop()
            break
    await running


def _server(words: str) -> tuple[tuple[str, ...], str | None, str | None]:
    """URL, or URL|URL...,NKEY,CA."""
    url, nkey, ca = [*words.split(","), None, None][:3]
    return tuple((url or "").split("|")), nkey, ca


def main() -> None:
    path, url, host, count, *rest = sys.argv[1:]
    pause = float(rest[0]) if rest else 0.05
    size = int(rest[1]) if len(rest) > 1 else 64 << 20
    logging.basicConfig(level=logging.INFO)
    spool = Spool(path, size)
    source = FlowSource("/nowhere")

    class Unread(FlowSource):
        """Nobody reads a daemon."""

        def __exit__(self, *_: object) -> None:
            pass

    source.__class__ = Unread
    exporter = Exporter(source, spool, FleetServer(*_server(url)), host, pause)

    async def play() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, exporter.stop)
        await _play(exporter, source, spool, int(count), pause)

    asyncio.run(play())
    print(spool.totals(), spool.totals().closes)


if __name__ == "__main__":
    main()
