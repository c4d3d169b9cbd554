# SPDX-License-Identifier: MIT
"""How often the daemon looks at the kernel's sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.serve.questions import Cancelled
from daemon.system.watcher import _SOCKETS, Watcher, _pause
from nlproto.errors import Error
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import BoundSocket
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from waiting import stand_in, until

NOBODYS = 1 << 30
"""A pid that no process has."""


@pytest.mark.parametrize("took", [0.001, 0.01, 0.1, 0.2])
def test_looks_take_a_fifth_of_a_percent_of_a_core_while_nobody_asks(took: float) -> None:
    assert _pause(_SOCKETS, took) >= min(500 * took, 59)
    assert _pause(_SOCKETS, took) + took <= 60


@pytest.fixture
def watched() -> Iterator[tuple[Any, ...]]:
    """A watcher whose looks are long ago, and how many there were."""
    portmap = SimpleNamespace(
        update_bound=lambda *_: None,
        replace_bound=lambda *_: None,
        add_connected=lambda *_: None,
        keep_cookies=lambda *_: None,
        expire=lambda *_: None,
        last_users=lambda _: {},  # a socket of this machine may have dropped packets
    )
    pipeline = SimpleNamespace(
        engine_stats={},
        engine=SimpleNamespace(name="packet"),
        failed=False,
        portmap=portmap,
        processes=Processes(),
    )
    watcher = Watcher("packet", stand_in(pipeline), lambda *_, **__: None, print, Holders())
    looks = []
    read = watcher.kernel.read

    def counted() -> Any:
        looks.append(time.monotonic())
        return read()

    stand_in(watcher.kernel).read = counted
    with watcher:
        yield watcher, looks


def test_who_asks_gets_what_is_of_this_second(
    watched: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks that took 0.2 s come once in 20 s by themselves."""
    monkeypatch.setattr("daemon.system.watcher._pause", lambda interval, took: 20.0)
    monkeypatch.setattr("daemon.system.watcher._FRESH", 60.0)
    watcher, looks = watched
    watcher.refresh(lambda: None)
    watcher.refresh(lambda: None)
    assert len(looks) == 1
    watcher._looked -= 120  # s ago
    asked = time.monotonic()
    watcher.refresh(lambda: None)
    assert len(looks) == 2 and looks[1] >= asked - 0.1


def test_who_sees_everything_and_asks_again_need_not_wait(
    watched: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next look begins before what is known is too old, and only for such a user."""
    monkeypatch.setattr("daemon.system.watcher._pause", lambda interval, took: 20.0)
    watcher, looks = watched
    watcher.refresh(lambda: None)
    until(lambda: time.monotonic() - looks[0] > 0.5, 10, "half a second")
    watcher._looked = time.monotonic() - 0.5
    watcher.refresh(lambda: None)
    assert len(looks) == 1
    watcher.refresh(lambda: None, True)
    until(lambda: len(looks) == 2, 10, "the look")


@pytest.mark.parametrize(("age", "full", "waits"), [(2, True, 0), (2, False, 1), (3600, True, 1)])
def test_who_sees_everything_does_not_wait_long_for_a_look_that_takes_long(
    watched: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    age: float,
    full: bool,
    waits: bool,
) -> None:
    """On a machine without time a look of 2 s ago is better than no answer; of an hour ago not."""
    monkeypatch.setattr("daemon.system.watcher._PATIENCE", 600.0)
    monkeypatch.setattr("daemon.system.watcher._BUSY", 0.0)
    watcher, _ = watched
    watcher.refresh(lambda: None)
    go_on = threading.Event()
    read = watcher.kernel.read
    stand_in(watcher.kernel).read = lambda: (go_on.wait(60), read())[1]
    watcher._looked = time.monotonic() - age
    asked: list[None] = []

    def stop() -> None:
        asked.append(None)
        if len(asked) == 10:
            go_on.set()

    watcher.refresh(stop, full)
    go_on.set()
    assert (len(asked) >= 10) == waits


def test_a_look_does_not_wait_for_details_of_processes(
    watched: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's process can make who reads its command line wait."""
    watcher, looks = watched
    reading, go_on = threading.Event(), threading.Event()

    def hang(tgid: int, *_: Any) -> None:
        if tgid == NOBODYS:
            reading.set()
            assert go_on.wait(60)

    monkeypatch.setattr(watcher._pipeline.processes, "add", hang)
    watcher._known(sockets_of([NOBODYS], 1000))
    watcher._looked = 0.0
    try:
        watcher.refresh(lambda: None)
        assert reading.wait(30)
        before, watcher._looked = len(looks), 0.0
        watcher.refresh(lambda: None)
        assert len(looks) > before and watcher.is_fresh
    finally:
        go_on.set()


def test_who_does_not_want_to_wait_any_more_is_let_go(watched: tuple[Any, ...]) -> None:
    watcher, _ = watched
    watcher.stop()
    watcher._looked = 0.0

    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        watcher.refresh(stop)


def test_probes_that_stop_and_fire_again_are_told_once_each_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = []
    pipeline = SimpleNamespace(engine_stats={"canary": 1}, engine=SimpleNamespace(name="module"))
    watcher = Watcher(
        "auto",
        stand_in(pipeline),
        lambda event, **fields: told.append((event, fields)),
        print,
        Holders(),
    )
    for canary in (1, 0, 0, 1):
        pipeline.engine_stats = {"canary": canary}
        watcher._look_at_probes()
    assert [event for event, _ in told] == ["probes", "probes"]
    assert "named late, wrongly or not at all" in told[0][1]["message"]
    assert "fire again" in told[1][1]["message"]
    assert all("\n" not in fields["message"] for _, fields in told)
    assert len(caplog.messages) == 2


def test_the_end_does_not_wait_for_a_look_that_hangs(watched: tuple[Any, ...]) -> None:
    watcher, _ = watched
    looking, go_on = threading.Event(), threading.Event()

    def hang() -> Any:
        looking.set()
        assert go_on.wait(60)
        raise Error("the look ended late")

    def asked() -> bool:
        """The first look may only now be over, and fresh."""
        watcher._looked = 0.0
        watcher._asked.set()
        return looking.is_set()

    stand_in(watcher.kernel).read = hang
    until(asked, 60, "a look begins")
    ended = threading.Event()

    def stop() -> None:
        watcher.stop()
        ended.set()

    threading.Thread(target=stop, daemon=True).start()
    in_time = ended.wait(30)
    go_on.set()
    assert in_time, "the end waits for a look"


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watcher, list[int], list[float]]]:
    """A watcher, the processes whose details it has read, and the time: each takes 10 ms."""
    now, read = [0.0], []
    monkeypatch.setattr("daemon.system.watcher.time", SimpleNamespace(monotonic=lambda: now[0]))

    def add(tgid: int, *_: Any) -> None:
        read.append(tgid)
        now[0] += 0.01

    def start_of(tgid: int, start_ns: int) -> int:
        return start_ns

    processes = SimpleNamespace(add=add, meet=lambda *_: None, start_of=start_of)
    pipeline = SimpleNamespace(processes=processes)
    yield Watcher("packet", stand_in(pipeline), lambda *_, **__: None, print, Holders()), read, now


def sockets_of(pids: Iterable[int], uid: int) -> list[BoundSocket]:
    return [BoundSocket((1, 17, 2, bytes(16), 9), pid, 5, uid, "x", pid) for pid in pids]


def test_details_of_users_processes_are_read_for_a_moment_alone_after_a_look(
    met: tuple[Watcher, list[int], list[float]],
) -> None:
    """They can have any number. Root's are all read, and those of others after later looks."""
    watcher, read, _ = met
    sockets = sockets_of(range(1000, 1060), 1000) + sockets_of(range(100, 150), 0)
    assert watcher._known(sockets) == sockets
    assert read == []  # the look itself waits for none
    watcher._meet()
    assert read[:50] == list(range(100, 150)) and len(read) <= 50 + 6
    for _ in range(12):
        watcher._meet()
    assert sorted(read) == sorted(one.tgid for one in sockets)


def test_a_user_with_many_processes_does_not_hold_up_details_of_others(
    met: tuple[Watcher, list[int], list[float]],
) -> None:
    watcher, read, _ = met
    watcher._known(sockets_of(range(1000, 1200), 1000) + sockets_of([7], 1001))
    watcher._meet()
    assert 7 in read


def test_drops_count_for_the_user_of_the_socket_and_else_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A socket that is not known has no cookie: nor have some sockets of other processes."""
    portmap = PortMap()
    bound = [
        BoundSocket((1, 17, 2, bytes(16), 50 + tgid), tgid, 10, 0, "x", cookie)
        for cookie, tgid in ((0, 1), (5, 2))
    ]
    portmap.replace_bound(bound, 0)
    watcher = Watcher("packet", stand_in(None), lambda *_, **__: None, print, Holders())
    told = []
    watcher.on_reason = lambda *what: told.append(what)
    watcher.dropped = {0: {"WHY": 2}, 5: {"ROOM": 3}}
    watcher._count_reasons(portmap)
    assert told == [(2, 10, b"x", "ROOM", 3)]
    watcher.dropped[5] = {"ROOM": 7}
    watcher._count_reasons(portmap)
    monkeypatch.setattr("daemon.system.watcher._STRANGE", 0.0)
    watcher._count_reasons(portmap)
    assert told[1:] == [(2, 10, b"x", "ROOM", 4), (0, 0, b"", "WHY", 2)]
