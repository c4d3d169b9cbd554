# SPDX-License-Identifier: MIT
"""Columns of hunter top that are there once there is something in them."""

from __future__ import annotations

import os
import socket
from typing import Any

from hunter.top.going import Going
from hunter.top.grid import Grid
from hunter.top.views import FlowsView
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import DropReasons
from nlproto.records.ends import ToldEnds, record_keys
from nlproto.tables.flows import pack_address
from topping import REPLY, Feed, batch, becomes, cells, drive


def test_what_nat_makes_of_ends_is_a_column_where_it_changes_them() -> None:
    feed, told = Feed(), ToldEnds()
    feed.ends = told
    rows: list[dict[str, Any]] = [
        {},
        {"sport": 50001, "dport": 8080},
        {"sport": 8000, "dport": 50002},
    ]
    published = "10.88.0.2", 80
    local, remote = "10.0.0.1", "10.0.0.2"
    for key, became in zip(
        record_keys(batch(*rows[1:]).records),
        ((local, 50001, *published), ("10.9.9.9", 80, remote, 50002)),
        strict=True,
    ):
        near, lport, far, rport = became
        told.tell(key, "", (pack_address(near)[1], lport, pack_address(far)[1], rport))
    feed.put(rows[0])

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("enter")
        await becomes(pilot, lambda: isinstance(app.screen, FlowsView) and cells(app))
        grid = app.screen.query_one(Grid)
        assert "nat" not in grid.render_line(0).text.split()
        feed.put(*rows)
        await becomes(pilot, lambda: len(cells(app)) == 3)
        assert {(row[1], row[-1]) for row in cells(app)} == {
            ("10.0.0.1.50000", ""),
            ("10.0.0.1.50001", "<> 10.88.0.2.80"),
            ("10.0.0.1.8000", "10.9.9.9.80"),
        }
        await becomes(pilot, lambda: "nat" in grid.render_line(0).text.split())
        for key in list(record_keys(batch(*rows).records)):
            told.tell(key, "")
        feed.put({"sport": 8000, "dport": 50002, "tcp_flags": 2})  # another connection
        await becomes(pilot, lambda: ("10.0.0.1.8000", "") in {(r[1], r[-1]) for r in cells(app)})
        assert "<> 10.88.0.2.80" in {row[-1] for row in cells(app)}

    drive(feed, script)


def tells_receivers() -> bool:
    try:
        with DropReasons() as reasons:
            return reasons.tells_receivers
    except NoBpf:
        return False


def test_how_connections_go_is_a_column_where_the_kernel_tells_it() -> None:
    feed = Feed()
    with (
        Going() as going,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        cookies = [int.from_bytes(one.getsockopt(1, 57, 8), "little") for one in (client, full)]
        full.bind(("127.0.0.1", 0))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for _ in range(50):
            full.sendto(b"x" * 500, full.getsockname())
        feed.put({"cookie": cookies[0]}, {"cookie": cookies[1], "sport": 9, "proto": 17})

        async def script(app: Any, pilot: Any) -> None:
            def goes() -> tuple[str, str, str]:
                (row,) = cells(app)
                return row[11], row[13], row[14]

            await becomes(pilot, lambda: all(goes()[:2]))
            rtt, dropped, why = goes()
            assert why == (f"{dropped} SOCKET_RCVBUFF" if tells_receivers() else "")
            assert rtt.endswith(" ms") and 0 < int(dropped) <= 50
            head = app.screen.query_one(Grid).render_line(0).text.split()
            assert {"rtt", "dropped"} <= set(head) and not {"failed", "resets"} & set(head)

        drive(feed, script, going=going, size=(200, 20))


def test_attempts_that_fail_and_resets_are_columns() -> None:
    feed = Feed()
    reset = REPLY | {"tcp_flags": 4 | 16, "len": 40}
    feed.put({"tcp_flags": 2, "len": 60}, reset, {"tgid": 1, "comm": b"init"})

    async def script(app: Any, pilot: Any) -> None:
        await becomes(pilot, lambda: len(cells(app)) == 2)
        failed = {row[0]: row[-2:] for row in cells(app)}
        assert failed == {str(os.getpid()): ["1", "1"], "1": ["", ""]}
        await becomes(
            pilot, lambda: "failed" in app.screen.query_one(Grid).render_line(0).text.split()
        )

    drive(feed, script, size=(200, 20))
