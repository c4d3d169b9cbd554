# SPDX-License-Identifier: MIT
"""Notifications to the service manager and log entries, read from real sockets."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.system.logs import JournalHandler, set_up
from daemon.system.notify import Notifier


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        yield manager


@pytest.fixture(name="root_logger")
def _root_logger() -> Iterator[Any]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield root
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def test_the_manager_is_told_in_its_own_words(manager: Any) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("engine packet,\nserving")
    assert manager.recv(1000) == b"READY=1\nSTATUS=engine packet, serving"
    notifier.reloading()
    assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    notifier.alive()
    assert manager.recv(1000) == b"WATCHDOG=1"
    notifier.stopping()
    assert manager.recv(1000) == b"STOPPING=1"


def test_without_a_manager_nothing_happens() -> None:
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": "/nonexistent/socket"}).ready("x")


def test_the_watchdog_is_for_the_process_it_names() -> None:
    mine = str(os.getpid())
    assert Notifier({"WATCHDOG_USEC": "3000000"}).watchdog == 3.0
    assert Notifier({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": mine}).watchdog == 3.0
    assert Notifier({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog is None
    assert Notifier({}).watchdog is None


def _fields(entry: Any) -> Any:
    fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        fields[name.decode()] = value
        entry = rest
    return fields


def test_the_journal_gets_fields_and_hostile_names_stay_inside_theirs(manager: Any) -> None:
    logger = logging.getLogger("test.journal")
    logger.propagate = False
    handler = JournalHandler(manager.getsockname())
    logger.addHandler(handler)
    try:
        hostile = "a\nPRIORITY=0\nb\x1b[31m\udcff"
        logger.warning("name %s", hostile, extra={"fields": {"ENGINE": "packet"}})
    finally:
        logger.removeHandler(handler)
        handler.close()
    fields = _fields(manager.recv(1 << 16))
    assert fields["MESSAGE"].startswith(b"name a\nPRIORITY=0\nb")
    assert fields["PRIORITY"] == b"4"
    assert fields["PACKET_HUNTER_ENGINE"] == b"packet"
    assert fields["SYSLOG_IDENTIFIER"] == b"packet-hunterd"


def test_control_characters_do_not_reach_a_terminal(
    root_logger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up("stderr", "info", {}, True)
    logging.getLogger("x").info("name %s", "\x1b[31mred\x07\n2026")
    written = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d packet-hunterd: name \\x1b\[31mred\\x07\\x0a2026\n"
    assert re.fullmatch(written, capsys.readouterr().err)


def test_no_line_of_a_traceback_passes_for_a_message(
    root_logger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up("stderr", "info", {}, True)
    try:
        raise ValueError("x\n2026-01-01 00:00:00 packet-hunterd: \x1b[31mending")
    except ValueError:
        logging.getLogger("x").exception("failed")
    _, *others = capsys.readouterr().err.splitlines()
    assert len(others) > 3 and all(one.startswith("    ") and one.isprintable() for one in others)


def test_syslog_when_asked(root_logger: Any, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.system.logs._SYSLOG", manager.getsockname())
    set_up("syslog", "info", {}, False)
    logging.getLogger("x").warning("name %s", "\x1b[31m")
    # facility daemon (3), severity warning (4)
    start = f"<{3 * 8 + 4}>packet-hunterd[{os.getpid()}]: name ".encode()
    assert manager.recv(1000).startswith(start + rb"\x1b[31m")


def test_a_log_destination_that_is_not_there_falls_back_to_stderr(
    root_logger: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.system.logs._SYSLOG", "/nonexistent/log")
    set_up("syslog", "info", {}, False)
    logging.getLogger("x").info("still here")
    captured = capsys.readouterr().err
    assert "no syslog here" in captured and "still here" in captured


def test_auto_is_stderr_unless_the_journal_is_behind_it(root_logger: Any) -> None:
    set_up("auto", "info", {"JOURNAL_STREAM": "1:2"}, False)
    assert isinstance(root_logger.handlers[0], logging.StreamHandler)
    assert root_logger.handlers[0].stream is sys.stderr
