# SPDX-License-Identifier: MIT
"""hunter stats for people: what counts, in few words."""

from __future__ import annotations

import io
from typing import Any

from hunter.commands.stats import show
from hunter.show.console import Output

ACCOUNT = {
    "packets": 30,
    "recorded": 20,
    "delivered": 16,
    "waiting": 2,
    "named": 12,
    "unnamed": {"socket_gone": 4},
    "lost": {"socket": 2, "queue": 0},
}


def shown(**parts: Any) -> list[Any]:
    figures = {"version": "1", "pid": 7, "engine": "module", "started": 0.0} | parts
    out = io.StringIO()
    show(figures, Output(file=out, width=100))
    return [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]


def test_the_account_closes_also_while_some_are_being_named() -> None:
    lines = shown(account=ACCOUNT)
    assert lines[1:] == [
        "packets seen 30",
        "recorded 20",
        "records delivered 16",
        "named 12 75.00 %",
        "unnamed 4 socket gone 4",
        "being named 2",
        "lost 2 socket 2",
    ]


def test_parts_say_what_they_have_and_how_many_probes() -> None:
    engine = {"version": 1, "probes_registered": 0xFFFF, "probes_firing": 0xFEFF, "lost_batch": 0}
    lines = shown(account=ACCOUNT, engine_stats=engine | {"sockets": 1234}, queue={"bytes": 0})
    assert lines[-2:] == [
        "engine stats probes registered 16, probes firing 15, sockets 1,234",
        "queue",
    ]


def test_another_user_is_told_whose_the_account_is() -> None:
    assert "the account is for root and the group packet-hunter" in shown(account=None)


def _history(**fields: Any) -> dict[str, Any]:
    store = {"path": "/h.db", "open": True, "error": "", "failures": 0, "bytes": 5000}
    store |= {"waiting_flows": 3, "waiting_processes": 2, "unstored_processes": 0}
    return {"flows": 9, "unstored": fields.pop("unstored", 0), "store": store | fields}


def test_a_history_that_cannot_be_written_is_said_and_what_it_costs() -> None:
    assert shown(account=ACCOUNT, history=_history())[-1] == "history /h.db, 5,000 bytes"
    full = _history(error="/h.db: database or disk is full")
    assert shown(account=ACCOUNT, history=full)[-1] == (
        "/h.db: database or disk is full: 3 flows and 2 processes wait in memory"
    )
    lost = " ".join(shown(account=ACCOUNT, history=_history(unstored=4, unstored_processes=1)))
    assert "4 flows and 1 processes left memory before they were written" in lost
    assert "history" in " ".join(shown(account=ACCOUNT, history={"flows": 1, "store": None}))


def test_sizes_and_switches_are_said_in_peoples_words() -> None:
    lines = shown(
        account=ACCOUNT,
        engine_stats={"sock_diag": True},
        queue={"max_bytes": 64 << 20, "peak_bytes": 97104},
    )
    assert lines[-2:] == [
        "engine stats sockets asked of sock_diag",
        "queue room for 64.0 MiB, most at once 94.8 KiB",
    ]


def test_a_daemon_of_another_release_may_leave_out_anything() -> None:
    out = io.StringIO()
    show({}, Output(file=out, width=100))
    show({"account": {}, "clients": None, "queue": []}, Output(file=out, width=100))
    show({"account": {}, "history": {"store": {"path": "/h"}}}, Output(file=out, width=100))
    assert out.getvalue().startswith("daemon ?, pid ?, engine ?")
