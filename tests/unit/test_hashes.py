# SPDX-License-Identifier: MIT
"""SHA-256 of programs: of the file that runs, also when it is gone or replaced by then."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import hashes, procfs
from nlproto.host.hashes import Hashes
from nlproto.tables.processes import Processes
from waiting import noting, there, until


@pytest.fixture
def told() -> list[Any]:
    return []


@pytest.fixture
def hasher(told: list[Any]) -> Iterator[Hashes]:
    with Hashes(lambda *answer: told.append(answer)) as found:
        yield found


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Any, ...]]:
    """(its path, its hash, a process that runs it)."""
    path = tmp_path / "program"
    shutil.copy(there(shutil.which("sleep")), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    process = subprocess.Popen([path, "100"])
    until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(path))
    yield path, digest, process
    process.kill()
    process.wait()


def test_a_program_that_ends_or_is_replaced_at_once_has_its_own_hash(
    hasher: Hashes, told: list[Any], program: tuple[Any, ...]
) -> None:
    path, digest, process = program
    hasher.ask(process.pid, 7, "x")
    path.unlink()
    path.write_bytes(b"another")
    process.kill()
    process.wait()
    until(lambda: told == [(process.pid, 7, "x", digest)])


def test_each_file_is_read_once_until_it_changes(
    hasher: Hashes, told: list[Any], program: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, digest, process = program
    read: list[Any] = []
    monkeypatch.setattr(hasher, "_piece", noting(read, lambda more: more(1 << 20)), raising=False)
    for number in range(5):
        hasher.ask(process.pid, number, "x")
    until(lambda: len(told) == 5)
    assert {answer[3] for answer in told} == {digest}
    assert len(read) == 2  # the file, and its end


def test_what_waits_is_bounded_and_so_are_its_descriptors(
    told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasher = Hashes(lambda *answer: told.append(answer))  # its thread does not run
    before = len(os.listdir("/proc/self/fd"))
    for number in range(hashes._WAITING + 10):
        hasher.ask(os.getpid(), number, "x")
    assert len(os.listdir("/proc/self/fd")) <= before + hashes._WAITING
    assert hasher.left_out == 10
    hasher.__enter__()
    until(lambda: len(told) == hashes._WAITING)
    until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_what_a_program_or_the_network_serves_is_not_opened(
    hasher: Hashes, program: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        line.partition(" - ")[2].split()[0] for line in open("/proc/self/mountinfo").readlines()
    }
    monkeypatch.setattr(hashes, "_FOREIGN", tuple(kinds))
    file = os.open(f"/proc/{program[2].pid}/exe", os.O_PATH)
    try:
        wanted = hashes._Wanted(file, program[2].pid, 1, "x")
        assert hasher._hash(wanted) == ""
        monkeypatch.undo()
        assert hasher._hash(wanted) == program[1]
    finally:
        os.close(file)


def test_one_that_is_gone_or_has_no_program_is_left_out(hasher: Hashes, told: list[Any]) -> None:
    hasher.ask(2**22 + 7, 1, "x")
    hasher.ask(2, 1, "x")  # a kernel thread, or nobody
    hasher.ask(os.getpid(), 3, "y")
    until(lambda: [answer[1] for answer in told][-1:] == [3])


def test_a_process_gets_the_hash_of_the_program_that_it_still_runs() -> None:
    processes = Processes(procfs.details)
    with Hashes(processes.hashed) as hasher:
        processes.hash = hasher.ask
        here = procfs.identity(os.getpid())
        processes.add(there(here).tgid, there(here).start_ns)
        with open(os.path.realpath(sys.executable), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        until(lambda: there(processes.get(there(here).tgid, there(here).start_ns)).sha256 == digest)
    processes.hashed(there(here).tgid, there(here).start_ns, "/bin/other", "0" * 64)
    assert there(processes.get(there(here).tgid, there(here).start_ns)).sha256 == digest
