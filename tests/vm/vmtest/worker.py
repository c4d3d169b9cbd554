# SPDX-License-Identifier: MIT
"""pytest in the guest: runs the tests that vmtest.remote names, and sends their reports back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from waiting import patient

from .guest import PORT


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker(config, open_port()))


class Worker:
    """Replaces pytest's own loop over the tests."""

    def __init__(self, config: pytest.Config, port: BinaryIO) -> None:
        self._config = config
        self._port = port

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests = {item.nodeid: item for item in session.items}
        self._send({"ready": list(tests), "slowness": patient(1)})
        for line in self._port:
            order = json.loads(line)
            if "stop" in order:
                break
            item, following = tests[order["run"]], tests.get(order["next"])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._send({"done": item.nodeid})
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send({"report": data})

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[self._port.write(data) :]


def open_port() -> BinaryIO:
    """The virtio-serial port to the host, found by its name (udev need not run)."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return open(f"/dev/{name.parent.name}", "r+b", buffering=0)
    raise pytest.UsageError("vmtest.worker runs in a guest that vmtest.remote booted, only there")
