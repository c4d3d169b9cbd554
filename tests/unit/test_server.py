# SPDX-License-Identifier: MIT
"""Whatever fails while a client waits: it is answered, and everybody else is served."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from daemon.history.memory import FlowMemory
from daemon.serve.answers import Answers
from daemon.serve.server import Server
from daemon.serve.subscription import Subscription
from daemon.system.config import Config
from daemon.system.socketfile import SocketFile
from nlproto.client.client import DaemonClient
from nlproto.client.frames import Kind, encode_json
from nlproto.errors import Error, NoDaemon, UsageError
from nlproto.pipeline.account import Account
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records import wire
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from recording import make_batch, make_records
from waiting import stand_in, until

FAILED = "the daemon failed on this request; see its log"


class Quiet:
    """An engine with nothing to tell but what `batches` has."""

    name = "quiet"
    group = "packets"
    instance = 7
    awaited: Callable[[], bool]

    def __init__(self) -> None:
        self.opening = self.closing = np.zeros(0, wire.TAIL)
        self.batches: list[Any] = []
        self.pause = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def read(self, timeout: Any) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop(0)
        self.pause.wait(min(timeout, 0.01))

    def wake(self) -> None:
        pass

    def want_packets(self, wanted: Any) -> tuple[()]:
        return ()

    def catch_up(self) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop(0)

    def finish(self, until_ns: Any = None) -> Any:
        return iter(())

    def want_first_bytes(self, wanted: Any) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {}


class Running:
    """A server in a thread of its own."""

    def __init__(self, path: Any) -> None:
        self.path = f"{path}/d.sock"
        self.engine = Quiet()
        self.pipeline = Pipeline(
            stand_in(self.engine), account=Account(), processes=Processes(), portmap=PortMap()
        )
        self.ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._loop = loop
        config = Config(socket=self.path)
        answers = Answers(self.pipeline, FlowMemory(16))
        self.server = Server(loop, answers, config, dict)
        with SocketFile(self.path) as file, self.pipeline:
            self.pipeline.subscribe(self.server.publish)
            self.server.start(file.socket)
            self.ready.set()
            await self._ended.wait()
            await loop.run_in_executor(None, self.pipeline.stop)
            await self.server.stop()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


@pytest.fixture(name="running")
def _running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as running:
        yield running


def broken(*_arguments: Any, **_names: Any) -> None:
    raise ZeroDivisionError("broken")


def test_after_a_refusal_nobody_is_accepted_for_a_moment(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who connects without end would cost others the event loop."""
    pauses: list[float] = []
    pause = running.server._pause

    def paused(listener: socket.socket, seconds: float) -> None:
        pauses.append(seconds)
        pause(listener, seconds)

    monkeypatch.setattr(running.server, "_pause", paused)
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as refused:
        patch.setattr(running.server, "_admit", lambda fd: False)
        refused.connect(running.path)
        until(lambda: pauses, 30, "a pause")
    assert len(pauses) == 1 and 0 < pauses[0] < 0.1
    with DaemonClient(running.path):
        assert len(pauses) == 1


def test_roots_short_filter_does_not_wait_behind_a_question(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, go_on = threading.Event(), threading.Event()

    def who(*_: Any, **__: Any) -> dict[str, Any]:
        answering.set()
        assert go_on.wait(60)
        return {}

    monkeypatch.setattr(type(running.server.answers), "who", who)
    with DaemonClient(running.path) as asking, DaemonClient(running.path) as subscribing:
        question = threading.Thread(target=asking.who, daemon=True)
        question.start()
        assert answering.wait(60)
        subscribing.start("udp port 9")
        assert question.is_alive()
        go_on.set()
        question.join()


def test_a_question_ends_when_who_has_ended_its_requests_goes(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, ended = threading.Event(), threading.Event()

    def who(_self: Any, _request: Any, _uid: Any, stop: Any, **_: Any) -> None:
        answering.set()
        try:
            until(stop, 60, "an end")
        finally:
            ended.set()

    monkeypatch.setattr(type(running.server.answers), "who", who)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(running.path)
        raw.sendall(encode_json(Kind.CONTROL, {"id": 1, "op": "who"}))
        raw.shutdown(socket.SHUT_WR)
        assert answering.wait(60)
    assert ended.wait(20)
    until(lambda: not running.server._sessions, 20, "its place")


def test_a_subscription_that_fails_is_answered_and_can_be_tried_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as client:
        with monkeypatch.context() as patch:
            patch.setattr(running.server, "share_out", broken)
            with pytest.raises(Error, match=FAILED):
                client.start("udp")
        with pytest.raises(UsageError, match="no subscription"):
            client.unsubscribe()
        client.start("udp")


@pytest.mark.parametrize("part", ["_account", "after_all_records"])
def test_what_fails_behind_the_barrier_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with DaemonClient(running.path) as client, DaemonClient(running.path) as other:
        other.start("")
        with monkeypatch.context() as patch:
            patch.setattr(running.server, part, broken)
            with pytest.raises(Error, match=FAILED):
                client.start("udp")
            with pytest.raises(Error, match=FAILED):
                other.unsubscribe()
        assert client.owner(1) == {"owners": [], "truncated": False}
        assert other.owner(1)["owners"] == []


def test_the_end_of_a_subscription_that_fails_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as client:
        client.start("")
        with monkeypatch.context() as patch:
            patch.setattr("daemon.serve.session.Session._shown", broken)
            with pytest.raises(Error, match=FAILED):
                client.unsubscribe()
        client.start("udp")
        client.unsubscribe()


def test_a_question_for_which_there_is_no_thread_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with DaemonClient(running.path) as client:
        with monkeypatch.context() as patch:
            patch.setattr(running.server.loop, "run_in_executor", no_thread)
            with pytest.raises(Error, match="can't start new thread"):
                client.who(port=1)
        with pytest.raises(UsageError):
            client.start("wrong wrong")


def test_a_turn_that_fails_costs_one_client_its_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as other:
        with monkeypatch.context() as patch:
            patch.setattr("nlproto.client.frames.Decoder.next", broken)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                raw.connect(running.path)
                raw.settimeout(30)
                raw.sendall(b"x" * 8)
                assert raw.recv(1) == b""
        assert other.owner(1)["owners"] == []


def test_a_connection_that_cannot_be_taken_leaves_the_others_their_turns(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as other:
        with monkeypatch.context() as patch:
            patch.setattr("daemon.serve.server.has_gone", broken)
            with pytest.raises(Error):
                DaemonClient(running.path)
            patch.setattr("daemon.serve.server.peer_of", broken)
            with pytest.raises(Error):
                DaemonClient(running.path)
        assert other.owner(1)["owners"] == []
        with DaemonClient(running.path) as another:
            assert another.owner(1)["owners"] == []


def test_what_fails_before_anybody_is_accepted_is_not_tried_without_a_pause(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def failing(*_: Any) -> None:
        tries.append(time.monotonic())
        raise ZeroDivisionError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(running.server._payers, "refresh", failing)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(running.path)
            until(lambda: len(tries) >= 4)
    assert min(late - early for early, late in itertools.pairwise(tries)) > 0.05
    with DaemonClient(running.path) as client:
        assert client.owner(1) == {"owners": [], "truncated": False}


def test_frames_that_cannot_be_made_cost_one_client_its_stream(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as victim, DaemonClient(running.path) as other:
        victim.start("")
        other.start("")
        victims = next(iter(running.server._sessions)).subscription
        pumped = Subscription.next_frame

        def next_frame(subscription: Any) -> Any:
            return broken() if subscription is victims else pumped(subscription)

        monkeypatch.setattr(Subscription, "next_frame", next_frame)
        running.engine.batches.append(make_batch(make_records({})))
        gone: set[Any] = set()
        got: list[Any] = []

        def read() -> Any:
            for client in {victim, other} - gone:
                try:
                    got.extend(event for event in client.read(0.1) if hasattr(event, "batch"))
                except NoDaemon:
                    gone.add(client)
            return got and gone

        until(read)
        (left,) = {victim, other} - gone
        assert left.unsubscribe()["sent"] == 1


def test_what_looks_after_clients_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonClient(running.path) as client:
        client.start("")
        tried = threading.Event()

        def failing(*_: Any) -> None:
            tried.set()
            raise ZeroDivisionError("broken")

        with monkeypatch.context() as patch:
            patch.setattr("daemon.serve.server._hung_up", failing)
            assert tried.wait(30)
        looked = threading.Event()

        def look(_: Any) -> list[Any]:
            looked.set()
            return []

        monkeypatch.setattr("daemon.serve.server._hung_up", look)
        assert looked.wait(30)
