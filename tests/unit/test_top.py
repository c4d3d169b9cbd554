# SPDX-License-Identifier: MIT
"""hunter top, driven by its keys."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
from textual.widgets import Input, Static

from hunter.top.grid import Grid
from hunter.top.groups import Help
from hunter.top.views import FlowsView, ProcessesView
from nlproto import Error
from nlproto.records import wire
from nlproto.tables.processes import Process
from topping import REPLY, Feed, becomes, cells, drive, text
from waiting import noting


def test_processes_stand_by_rate_with_user_place_and_account() -> None:
    feed = Feed(Process(os.getpid(), 1, unit="web.service"))
    feed.put({"len": 100}, {"tgid": 1, "comm": b"init", "len": 5000})

    async def script(app: Any, pilot: Any) -> None:
        rows = cells(app)
        assert [row[1] for row in rows] == ["init", "web"]
        assert rows[1][0] == str(os.getpid()) and rows[1][2] == "root"
        assert rows[1][8:11] == ["100 B", "1", "web.service"]
        assert text(app, "#account") == "2 packets, 2 named (100.0 %), 3 lost (a test)"

    drive(feed, script)


def test_enter_shows_flows_tab_far_ends_and_escape_goes_back() -> None:
    feed = Feed(Process(os.getpid(), 1, exe="/usr/sbin/web"))
    feed.put({}, {"sport": 50001}, REPLY)

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("enter")
        await becomes(
            pilot,
            lambda: (
                f"web.{os.getpid()}: 2 flows, sorted by rate  /usr/sbin/web" == text(app, "#title")
            ),
        )
        assert isinstance(app.screen, FlowsView)
        assert {(row[1], row[2]) for row in cells(app)} == {
            ("10.0.0.1.50000", "10.0.0.2.http"),
            ("10.0.0.1.50001", "10.0.0.2.http"),
        }
        await pilot.press("tab")
        await becomes(pilot, lambda: [row[2] for row in cells(app)] == ["10.0.0.2"])
        await pilot.press("escape")
        await becomes(pilot, lambda: not isinstance(app.screen, FlowsView))

    drive(feed, script)


def test_far_ends_of_two_namespaces_of_a_file_say_which() -> None:
    feed = Feed()
    feed.put({"netns": 11}, {"netns": 12})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("enter")
        await becomes(pilot, lambda: isinstance(app.screen, FlowsView) and cells(app))
        assert {row[2] for row in cells(app)} == {
            "10.0.0.2.http netns 11",
            "10.0.0.2.http netns 12",
        }
        await pilot.press("tab")
        await becomes(
            pilot,
            lambda: {row[2] for row in cells(app)} == {"10.0.0.2 netns 11", "10.0.0.2 netns 12"},
        )

    drive(feed, script)


def test_greater_sorts_by_the_next_column() -> None:
    feed = Feed()
    feed.put({"tgid": 1, "comm": b"zzz", "len": 9000}, {"comm": b"aaa"})

    async def script(app: Any, pilot: Any) -> None:
        assert [row[1] for row in cells(app)] == ["zzz", "aaa"]
        for _ in range(10):
            await pilot.press("greater_than_sign")
            if text(app, "#title").endswith("by name"):
                break
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["aaa", "zzz"])

    drive(feed, script)


def test_slash_filters_as_one_types_and_escape_ends_it() -> None:
    feed = Feed()
    feed.put({"tgid": 1, "comm": b"nginx"}, {"comm": b"curl"})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("slash", *"CUR")
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["curl"])
        await pilot.press("escape")
        await becomes(pilot, lambda: len(cells(app)) == 2)
        assert not app.screen.query_one(Input).display

    drive(feed, script)


def test_space_pauses_what_is_shown_but_not_the_count() -> None:
    feed = Feed()
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("space")
        feed.put({"tgid": 1, "comm": b"late"})
        await becomes(pilot, lambda: app.state.shown.records == 2)
        assert len(cells(app)) == 1 and "PAUSED" in text(app, "#title")
        await pilot.press("space")
        await becomes(pilot, lambda: len(cells(app)) == 2)

    drive(feed, script)


def test_u_changes_the_units() -> None:
    feed = Feed()
    feed.put({"len": 1000})

    async def script(app: Any, pilot: Any) -> None:
        assert cells(app)[0][8] == "1000 B"
        await pilot.press("u")
        await becomes(pilot, lambda: cells(app)[0][8] == "7.8 Kib")

    drive(feed, script)


def test_an_ended_process_stays_and_says_so() -> None:
    feed = Feed(Process(4194304, 1, exit_ns=5))
    feed.put({"tgid": 4194304})

    async def script(app: Any, pilot: Any) -> None:
        assert cells(app)[0][1] == "web (ended)"

    drive(feed, script, kept_s=math.inf)  # of a file


@pytest.mark.parametrize("name", [b"\x1b[2Jx", b"a\nb", b"[/red]", b"[@click=quit]x", b"\xff"])
def test_a_hostile_name_is_only_text(name: bytes) -> None:
    feed = Feed(Process(os.getpid(), 1, exe=wire.text(name), unit=wire.text(name)))
    feed.put({"comm": name})

    async def script(app: Any, pilot: Any) -> None:
        (row,) = cells(app)
        assert row[1].isprintable() and row[10].isprintable()
        assert row[1] in ("[@click=quit]x", "\\x1b[2Jx", "a\\x0ab", "[/red]", "\\xff")
        await pilot.press("enter")
        await becomes(pilot, lambda: isinstance(app.screen, FlowsView) and cells(app))
        assert text(app, "#title").isprintable()
        app.export_screenshot()

    drive(feed, script)


def test_a_source_that_fails_ends_the_program_with_its_error() -> None:
    feed = Feed()
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        feed.failure = Error("the module is gone")
        await becomes(pilot, lambda: app.state.failure)

    assert str(drive(feed, script).state.failure) == "the module is gone"


def test_s_and_r_sort_as_in_nethogs() -> None:
    feed = Feed()
    feed.put({"tgid": 1, "comm": b"sends", "len": 9000}, REPLY | {"comm": b"receives"})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("r")
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["receives", "sends"])
        await pilot.press("s")
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["sends", "receives"])

    drive(feed, script)


def test_ten_thousand_rows_are_made_only_where_one_looks() -> None:
    feed = Feed()
    feed.put(*({"sport": 10_000 + i} for i in range(10_000)))

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("enter")
        await becomes(pilot, lambda: isinstance(app.screen, FlowsView))
        table = app.screen.query_one(Grid)
        await becomes(pilot, lambda: table.row_count == 10_000)
        made: list[Any] = []
        cells_of = app.screen.cells
        app.screen.cells = noting(made, cells_of)
        await pilot.press("end")
        await becomes(pilot, lambda: table.cursor == 9_999)
        await becomes(pilot, lambda: table.render_line(table.size.height - 1).text.strip())
        assert 0 < len(set(map(str, made))) < 100

    drive(feed, script)


def test_a_tick_while_the_view_is_taken_apart_does_nothing() -> None:
    feed = Feed()
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        await app.screen.query_one("#title").remove()
        app.tick()

    drive(feed, script)


def test_the_cursor_stays_on_its_process_once_moved() -> None:
    feed = Feed()
    feed.put({"tgid": 1, "comm": b"big", "len": 9000}, {"comm": b"small"})

    async def script(app: Any, pilot: Any) -> None:
        table = app.screen.query_one(Grid)
        await pilot.press("down")
        assert table.selected.comm == "small"
        feed.put(*({"comm": b"small", "len": 60000} for _ in range(9)))
        await becomes(pilot, lambda: cells(app)[0][1] == "small")
        assert table.cursor == 0 and table.selected.comm == "small"

    drive(feed, script)


def test_a_click_on_a_heading_sorts_and_on_the_row_opens() -> None:
    feed = Feed()
    feed.put({"tgid": 1, "comm": b"zzz", "len": 9000}, {"comm": b"aaa"})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.click(Grid, offset=(8, 0))
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["aaa", "zzz"])
        await pilot.click(Grid, offset=(8, 1))
        await becomes(pilot, lambda: isinstance(app.screen, FlowsView))

    drive(feed, script)


def test_n_shows_numbers_and_names() -> None:
    feed = Feed()
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("enter")
        await becomes(pilot, lambda: cells(app)[0][2] == "10.0.0.2.http")
        await pilot.press("n")
        await becomes(pilot, lambda: cells(app)[0][2] == "10.0.0.2.80")

    drive(feed, script)


def test_a_source_that_has_ended_says_so() -> None:
    feed = Feed()
    feed.put({})
    feed.ended = True

    async def script(app: Any, pilot: Any) -> None:
        await becomes(pilot, lambda: "the source has ended" in text(app, "#account"))
        assert [row[1] for row in cells(app)] == ["web"]

    drive(feed, script)


def test_b_sums_up_by_name_unit_container_and_user_and_enter_shows_who() -> None:
    web: dict[str, Any] = {
        "unit": "web.service",
        "container": "docker:0123456789ab",
        "container_name": "web",
    }
    feed = Feed(Process(2**22 + 1, 1, **web), Process(2**22 + 2, 1, **web), Process(2**22 + 3, 1))
    feed.put(
        {"tgid": 2**22 + 1, "comm": b"nginx", "len": 500, "uid": 0},
        {"tgid": 2**22 + 2, "comm": b"nginx", "len": 500, "uid": 0},
        {"tgid": 2**22 + 3, "comm": b"curl", "len": 700, "uid": 0},
    )

    async def script(app: Any, pilot: Any) -> None:
        for by, wanted in {
            "name": [["nginx", "2"], ["curl", "1"]],
            "unit": [["web.service", "2"], ["-", "1"]],
            "container": [["docker:web", "2"], ["-", "1"]],
            "user": [["root", "3"]],
        }.items():
            await pilot.press("b")
            await becomes(
                pilot, functools.partial(lambda by: f"by {by}:" in text(app, "#title"), by)
            )
            await becomes(
                pilot,
                functools.partial(lambda rows: [row[:2] for row in cells(app)] == rows, wanted),
            )
            if by == "container":
                await pilot.press("enter")
                await becomes(
                    pilot, lambda: [row[1] for row in cells(app)] == ["nginx (ended)"] * 2
                )
                await pilot.press("escape")
                await becomes(pilot, lambda: "by container" in text(app, "#title"))
        await pilot.press("b")
        await becomes(pilot, lambda: isinstance(app.screen, ProcessesView))

    drive(feed, script, kept_s=math.inf)


def test_what_has_ended_is_hidden_once_it_is_silent_and_e_shows_it() -> None:
    feed = Feed(Process(2**22 + 5, 1, exit_ns=1), Process(os.getpid(), 1))
    feed.put({"tgid": 2**22 + 5, "comm": b"curl", "len": 5000}, {"comm": b"web"})

    async def script(app: Any, pilot: Any) -> None:
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["web"])
        assert "1 ended (e)" in text(app, "#title")
        await pilot.press("e")
        await becomes(pilot, lambda: [row[1] for row in cells(app)] == ["curl (ended)", "web"])

    drive(feed, script)


def test_question_mark_shows_every_key_and_any_key_ends_it() -> None:
    feed = Feed()
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press("question_mark")
        await becomes(pilot, lambda: isinstance(app.screen, Help))
        told = str(app.screen.query_one(Static).render())
        for words in ("/  Find", "?  Help", "q  Quit", "b  Sum up", "s  Sort by sent", "e  Show"):
            assert words in told, told
        await pilot.press("x")
        await becomes(pilot, lambda: isinstance(app.screen, ProcessesView))

    drive(feed, script)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_column_is_cut_in_the_middle(width: int) -> None:
    feed = Feed(Process(os.getpid(), 1, unit="a-rather-long-name-of-a-unit.service"))
    feed.put({"comm": b"fifteen-letters", "len": 1500, "gso_segs": 40, "hdr_len": 52})

    async def script(app: Any, pilot: Any) -> None:
        grid = app.screen.query_one(Grid)
        await becomes(pilot, lambda: grid.virtual_size.width <= width)
        head = grid.render_line(0).text.split()
        assert {"pid", "process", "rate"} <= set(head)
        assert ("runs" in head) == (width == 140)
        assert grid.render_line(1).text.split()[1] == "fifteen-letters"
        title = app.screen.query_one("#title", Static)
        assert title.size.width * title.size.height >= len(text(app, "#title"))

    drive(feed, script, size=(width, 20))


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
@pytest.mark.parametrize("before", [(), ("enter",), ("slash", "x")])
def test_q_and_ctrl_c_end_it_where_no_text_is_typed(key: str, before: tuple[str, ...]) -> None:
    feed = Feed(Process(os.getpid(), 1))
    feed.put({})

    async def script(app: Any, pilot: Any) -> None:
        await pilot.press(*before, key)
        typing = "slash" in before and key == "q"
        await becomes(pilot, lambda: app.is_running == typing)

    drive(feed, script)
