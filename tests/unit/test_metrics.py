# SPDX-License-Identifier: MIT
"""Metrics over a real socket: clients that do not read, or send nothing, are no burden."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from waiting import stand_in, until

pytest.importorskip("prometheus_client")

from daemon.system.config import Config  # noqa: E402
from daemon.system.metrics import Metrics  # noqa: E402
from nlproto.tables.flows import FLOW  # noqa: E402
from nlproto.tables.processes import Process, Processes  # noqa: E402
from nlproto.tables.shares import Payers  # noqa: E402

FIGURES = {
    "account": {
        **dict.fromkeys(("packets", "skipped", "records", "delivered", "named"), 1),
        "lost": {f"place{n}": 0 for n in range(50_000)},  # an answer that fills every buffer
        "unnamed": {},
    },
    "queue": {"bytes": 0},
    "clients": {"connected": 0, "queued_bytes": 0},
    "history": {"flows": 0},
    "processes": {"known": 0},
    "ports": {"known": 0},
}


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "m")
    with Metrics(Config(metrics=path), lambda: FIGURES):
        yield path


def _connect(path: Any, send: bytes = b"") -> Any:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(path)  # waits its turn, as it would not with a timeout
    one.settimeout(30)
    one.sendall(send)
    return one


def _threads() -> int:
    return sum("process_request" in thread.name for thread in threading.enumerate())


def test_a_client_that_does_not_read_writes_nothing_to_stderr(
    path: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("daemon.system.scrapes._Quiet.timeout", 0.2)
    held = [_connect(path, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(3)]
    until(_threads)
    until(lambda: not _threads())
    assert capfd.readouterr().err == ""
    for one in held:
        one.close()


def test_clients_that_send_nothing_hold_few_threads_and_others_are_answered(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.system.scrapes._Quiet.timeout", 60)
    held = [_connect(path) for _ in range(40)]
    one = _connect(path, b"GET /metrics HTTP/1.0\r\n\r\n")
    assert b"200 OK" in one.recv(100)
    until(lambda: _threads() <= 8)
    for each in (*held, one):
        each.close()


def test_answers_are_made_one_after_another_and_none_for_who_has_gone(tmp_path: Path) -> None:
    begun, going_on, done = threading.Semaphore(0), threading.Event(), []
    at_once: list[None] = []

    def figures() -> Any:
        at_once.append(None)
        most = len(at_once)
        begun.release()
        going_on.wait(30)
        at_once.pop()
        done.append(most)
        return FIGURES

    path = str(tmp_path / "m")
    with Metrics(Config(metrics=path), figures):
        held = [_connect(path, b"GET /metrics HTTP/1.0\r\n\r\n")]
        assert begun.acquire(timeout=30)
        held += [_connect(path, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(30)]
        until(lambda: _threads() > 8)
        going_on.set()
        assert b"200 OK" in held[-1].recv(100)
        for one in held:
            one.close()
        until(lambda: not _threads())
    assert max(done) == 1
    assert len(done) <= 20


def _scraped(metrics: Any) -> dict[tuple[Any, ...], Any]:
    return {
        (one.name, *one.labels.values()): one.value
        for family in metrics.collect()
        for one in family.samples
        if family.name.endswith("_bytes")
    }


def _flows(*owners: Any) -> Any:
    flows = np.zeros(len(owners), FLOW)
    for flow, (tgid, size) in zip(flows, owners, strict=True):
        flow["tgid"], flow["start_ns"], flow["bytes_in"] = tgid, tgid * 10, size
        flow["comm"] = b"x" * bool(tgid)
    return stand_in(SimpleNamespace(flows=flows))


def test_traffic_is_summed_by_unit_and_container_and_bounded(tmp_path: Path) -> None:
    processes = Processes()
    about: dict[int, dict[str, Any]] = {
        1: {"unit": "web.service"},
        2: {"unit": "web.service", "container": "docker:0123456789ab", "container_name": "web"},
        3: {"unit": "later.service", "container": "docker:0123456789ac", "container_name": "late"},
        # any user could make many of these
        4: {"unit": "user@7.service/a.service", "container": "podman:user@7/0123456789ab"},
        5: {"unit": "user@7.service/b.service", "container": "podman:user@7/0123456789ac"},
    }
    for tgid, more in about.items():
        processes.restore([Process(tgid, tgid * 10, **more)])
    config = Config(metrics=str(tmp_path / "m"), metrics_processes=2)
    with Metrics(config, lambda: FIGURES, processes) as metrics:
        metrics.take(_flows((1, 10), (2, 5), (0, 3)))
        metrics.take(_flows((4, 100), (5, 200)))
        metrics.take(_flows((3, 1), (9, 7)))
        found = _scraped(metrics)
    unit, container = "packet_hunter_unit_bytes_total", "packet_hunter_container_bytes_total"
    assert {key: value for key, value in found.items() if value and "process" not in key[0]} == {
        (unit, "web.service", "in"): 15,
        (unit, "user@7.service", "in"): 300,
        (unit, "other", "in"): 1,
        (container, "docker:0123456789ab", "web", "", "in"): 5,
        (container, "podman:user@7", "", "", "in"): 300,
        (container, "other", "", "", "in"): 1,
    }
    assert found["packet_hunter_process_bytes_total", "(unnamed)", "in"] == 3
    assert found["packet_hunter_process_bytes_total", "x", "in"] == 323


_UNITS = ("ms", "us", "ns", "milliseconds", "microseconds", "minutes", "hours", "kb", "kib", "mb",
          "mib", "bits", "percent")  # fmt: skip
"""What promtool's linter takes for units that are no base units."""


def test_names_follow_prometheus_s_conventions(tmp_path: Path) -> None:
    """By the rules of `promtool check metrics` (prometheus/util/promlint); and it, if installed."""
    processes = Processes()
    processes.restore([Process(1, 10, unit="a.service", container="docker:0123456789ab")])
    with Metrics(Config(metrics=str(tmp_path / "m")), lambda: FIGURES, processes) as metrics:
        metrics.take(_flows((1, 10)))
        metrics.drop_for(1, 10, b"x", "SOCKET_RCVBUFF", 3)
        learnt = _flows_learnt(1)
        metrics.learn(learnt)
        families = list(metrics.collect())
        exposed = _exposed(families)
    assert len({one.name for one in families}) == len(families) > 20
    for one in families:
        assert one.name.startswith("packet_hunter_"), one.name
        assert re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", one.name)
        assert one.documentation and one.type in ("counter", "gauge", "summary")
        assert not set(one.name.split("_")) & {*_UNITS, "counter", "gauge", "summary"}, one.name
        for sample in one.samples:
            assert (one.type == "counter") == sample.name.endswith("_total"), sample.name
            if one.type != "summary":
                assert not sample.name.endswith(("_count", "_sum", "_bucket"))
            assert not {"le", "quantile", "job", "instance"} & sample.labels.keys()
            assert all(re.fullmatch("[a-z][a-z_]*", label) for label in sample.labels)
    if promtool := shutil.which("promtool"):
        found = subprocess.run([promtool, "check", "metrics"], input=exposed, text=True,
                               capture_output=True)  # fmt: skip
        assert (found.returncode, found.stdout + found.stderr) == (0, "")
    for line in exposed.splitlines():
        name = re.sub(r"_(total|sum|count)$", "", re.split(r"[ {]", line.lstrip("# "))[0])
        if not line.startswith("#"):
            assert re.search(rf"^# HELP {name}(_total)? \S", exposed, re.MULTILINE), name
            assert re.search(rf"^# TYPE {name}(_total)? \w", exposed, re.MULTILINE), name


def _exposed(families: Any) -> Any:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(type("All", (), {"collect": lambda self: iter(families)})())
    return generate_latest(registry).decode()


def _flows_learnt(tgid: int) -> Any:
    made = np.zeros(1, FLOW)
    made["tgid"], made["start_ns"], made["comm"] = tgid, 10, b"x"
    made["retransmits"], made["rtt_us"] = 2, 1500
    return made


@pytest.mark.parametrize("programs", [10, 5000])
def test_series_do_not_grow_with_programs(tmp_path: Path, programs: int) -> None:
    """Label explosion: whatever names there are, so many series at most."""
    config = Config(metrics=str(tmp_path / "m"), metrics_processes=10)
    with Metrics(config, lambda: FIGURES) as metrics:
        made = _flows(*((number, 1) for number in range(1, programs + 1)))
        made.flows["comm"] = [f"p{number}".encode() for number in range(programs)]
        metrics.take(stand_in(made))
        each = {one.name: len(one.samples) for one in metrics.collect() if "_process_" in one.name}
    assert max(each.values()) <= 2 * (10 + 1), each


def _named(tgids: range, name: str) -> Any:
    made = _flows(*((tgid, 1) for tgid in tgids))
    made.flows["comm"] = [f"{name}{tgid}".encode() for tgid in tgids]
    return made


def test_one_users_names_take_no_series_of_others(tmp_path: Path) -> None:
    processes = Processes()
    owners = ((range(1, 41), 1000), (range(41, 45), 0), (range(45, 48), 1001))
    for tgids, uid in owners:
        processes.restore([Process(tgid, tgid * 10, uid=uid) for tgid in tgids])
    config = Config(metrics=str(tmp_path / "m"), metrics_processes=12)
    with Metrics(config, lambda: FIGURES, processes) as metrics:
        metrics.take(_named(range(1, 41), "flood"))
        metrics.drop_for(1, 10, b"flood1", "SOCKET_RCVBUFF", 3)
        metrics.drop_for(40, 400, b"flood40", "SOCKET_RCVBUFF", 2)
        metrics.take(_named(range(41, 45), "root"))
        metrics.take(_named(range(45, 48), "other-user"))
        metrics.take(_named(range(1, 41), "flood"))
        found = _scraped(metrics)
        reasons = [
            one.value
            for family in metrics.collect()
            if family.name == "packet_hunter_process_dropped_by_reason"
            for one in family.samples
        ]
    name = "packet_hunter_process_bytes_total"
    sums = {key[1]: value for key, value in found.items() if key[0] == name and key[-1] == "in"}
    assert len(sums) == 12 + 1 and sum(sums.values()) == 2 * 40 + 4 + 3
    names = Counter(name.rstrip("0123456789") for name in sums)
    assert names == {"root": 4, "other-user": 3, "flood": 5, "other": 1}
    assert sum(reasons) == 5 and len(reasons) <= 2


def test_subordinate_uids_have_no_series_of_their_own(tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text("1000:100000:65536\n")
    processes = Processes()
    processes.restore([Process(tgid, tgid * 10, uid=100_000 + tgid) for tgid in range(1, 41)])
    processes.restore([Process(41, 410, uid=1001), Process(42, 420, uid=1001)])
    config = Config(metrics=str(tmp_path / "m"), metrics_processes=4)
    with Metrics(config, lambda: FIGURES, processes, Payers(str(subuid))) as metrics:
        metrics.take(_named(range(1, 41), "flood"))
        metrics.take(_named(range(41, 43), "mine"))
        found = _scraped(metrics)
    assert {"mine41", "mine42"} <= {key[1] for key in found if len(key) > 2}


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        (b"Host: 127.0.0.1:9\r\n", b"200"),
        (b"Host: localhost:9\r\n", b"200"),
        (b"Host: [::1]\r\n", b"200"),
        (b"", b"200"),
        (b"Host: evil.example:9\r\n", b"403"),
        (b"Host: 127.0.0.1.evil.example\r\n", b"403"),
    ],
)
def test_a_page_of_another_name_gets_no_metrics(host: bytes, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Metrics(Config(metrics=f"127.0.0.1:{port}"), lambda: FIGURES):
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(b"GET /metrics HTTP/1.0\r\n" + host + b"\r\n")
            assert one.makefile("rb").readline().split()[1] == answer
