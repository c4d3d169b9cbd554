# SPDX-License-Identifier: MIT
"""The daemon as a service: metrics, the manager, messages for users who may not start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemons import StartDaemon, send
from nlproto.client.client import DaemonClient
from nlproto.errors import NoDaemon
from waiting import until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")


def test_metrics_are_served_on_a_unix_socket(
    start: StartDaemon, directory: Path, receiver: socket.socket
) -> None:
    path = f"{directory}/metrics.sock"
    daemon = start(config=f"metrics: {path}\nmetrics_processes: 1\n")
    send(receiver.getsockname()[1], 3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(10)
        raw.connect(path)
        raw.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert b"200 OK" in answer
    assert b"packet_hunter_records_total" in answer
    assert b"packet_hunter_process_bytes_total" in answer
    assert os.stat(path).st_mode & 0o777 == 0o660
    assert daemon.stop() == 0
    assert not os.path.exists(path)


PROMETHEUS = Path(__file__).parents[2] / ".venv/prometheus/usr/bin/prometheus"


def _free_port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.skipif(not PROMETHEUS.exists(), reason="no Prometheus: ./build.sh --test-tools")
def test_a_real_prometheus_server_scrapes_the_metrics(
    start: StartDaemon, directory: Path, receiver: socket.socket
) -> None:
    import urllib.error
    import urllib.parse
    import urllib.request

    port, own = _free_port(), _free_port()
    daemon = start(config=f"metrics: 127.0.0.1:{port}\nmetrics_processes: 1\n")
    send(receiver.getsockname()[1], 5)
    (directory / "prometheus.yml").write_text(
        "scrape_configs:\n- job_name: hunter\n  scrape_interval: 1s\n  static_configs:\n"
        f"  - targets: ['127.0.0.1:{port}']\n"
    )
    command = [str(PROMETHEUS), f"--config.file={directory}/prometheus.yml"]
    command += [f"--storage.tsdb.path={directory}/tsdb", f"--web.listen-address=127.0.0.1:{own}"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(query: Any) -> Any:
        url = f"http://127.0.0.1:{own}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with opener.open(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.URLError:
            return []  # it is starting

    with open(directory / "prometheus.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        (up,) = until(lambda: ask('up{job="hunter"} == 1'), 60)
        (records,) = until(lambda: ask("packet_hunter_records_total >= 10"), 60)
        for name in ("packets_total", "named_total", "queue_bytes", "clients"):
            assert ask(f"packet_hunter_{name}"), name
        places = {one["metric"]["place"] for one in ask("packet_hunter_lost_total")}
        assert places == {"alloc", "missed", "socket", "queue", "client", "failed"}
        names = {one["metric"]["comm"] for one in ask("packet_hunter_process_bytes_total")}
        # one name of its own, and what is over the limit
        assert 1 <= len(names) <= 2 and names - {"other"}
    finally:
        server.terminate()
        server.wait(30)
    assert daemon.stop() == 0


def test_the_manager_is_told_when_it_is_ready_and_when_it_stops(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "600000"}
        path = str(directory / "daemon.sock")
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", "daemon", "--engine", "packet", "--socket", path],
            env=environment,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            assert manager.recv(4096).startswith(b"READY=1\nSTATUS=engine packet")
            assert os.path.exists(path)
            assert manager.recv(4096) == b"WATCHDOG=1"
            assert manager.recv(4096) == b"WATCHDOG=1"
            child.send_signal(signal.SIGHUP)
            while not (got := manager.recv(4096)).startswith(b"RELOADING=1"):
                assert got == b"WATCHDOG=1"
            child.send_signal(signal.SIGTERM)
            while not (got := manager.recv(4096)).startswith(b"STOPPING=1"):
                assert got.startswith((b"WATCHDOG=1", b"READY=1"))
            assert child.wait(20) == 0
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def test_a_user_without_privilege_is_told_what_to_do(directory: Path) -> None:
    code = (
        "import os,sys\nfrom daemon.__main__ import main\nimport nlproto.engines.packet\n"
        "os.setgroups([]);os.setgid(65534);os.setuid(65534)\n"
        f"sys.exit(main(['--engine','packet','--socket','{directory}/none.sock']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30, cwd="/"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_daemon_is_a_clear_error(directory: Path) -> None:
    with pytest.raises(NoDaemon, match="start it with"):
        DaemonClient(directory / "nothing.sock")
