# SPDX-License-Identifier: MIT
"""How a hunter ends: by count, time, signal, a closed pipe, or SIGKILL."""

from __future__ import annotations

import csv
import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hunter.show.columns import COLUMNS
from hunting import (
    HUNTER,
    account_of,
    begun,
    hunt,
    traffic,
)
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")


def test_count_ends_after_exactly_n(server: tuple[int, int], no_daemon: list[str]) -> None:
    _, port = server
    with traffic(port):
        done = hunt(*no_daemon, "--json", "-c", "7", "port", port)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7


def test_duration_ends_by_itself(no_daemon: list[str]) -> None:
    began = time.monotonic()
    done = hunt(*no_daemon, "--duration", "500ms")
    assert done.returncode == 0 and time.monotonic() - began >= 0.5
    account_of(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_0_and_the_account(
    number: int, server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    _, port = server
    path = tmp_path / "x.csv"
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "--save", path, "port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        begun(process)
        until(lambda: path.read_text().count("\n") > 1)
        process.send_signal(number)
        stderr = process.communicate(timeout=patient(20))[1]
    assert process.returncode == 0
    assert account_of(stderr)["shown"] == len(path.read_text().splitlines()) - 1 > 0


def test_a_closed_pipe_ends_it_quietly_with_0(
    server: tuple[int, int], no_daemon: list[str]
) -> None:
    _, port = server
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "-n", "port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert there(process.stdout).readline()
        there(process.stdout).close()
        stderr = there(process.stderr).read()
        assert process.wait(20) == 0
    there(process.stderr).close()
    assert "Traceback" not in stderr and "Exception" not in stderr and "Broken" not in stderr
    account_of(stderr)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["top", "--help"], ["--version"], ["who", "--port", "1"]]
)
def test_short_answers_end_well_whoever_reads_them(arguments: list[str], unbuffered: str) -> None:
    command = [*HUNTER, *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed, open("/dev/full", "wb") as full:
        for output, code, lines in ((closed, 0, 0), (full, 1, 1)):
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
            if unbuffered and output is full and "who" not in arguments:
                continue  # argparse itself passes over what it cannot write
            told = [line for line in done.stderr.splitlines() if "until then" not in line]
            assert (done.returncode, len(told)) == (code, lines), done.stderr
            assert not told or "cannot write to standard output: No space left" in told[0]


def test_after_sigkill_the_parquet_file_is_finished(
    server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    _, port = server
    path = tmp_path / "x.parquet"
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "--save", path, "--print", "port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun(process)
        shown = [
            there(process.stdout).readline() for _ in range(20)
        ]  # a row is saved before it is shown
        process.kill()
        process.communicate()  # until the process that writes the file has ended too
    assert parquet.read_table(path).num_rows >= len(shown)


def test_after_sigkill_the_file_holds_whole_rows(
    server: tuple[int, int], no_daemon: list[str], tmp_path: Path
) -> None:
    _, port = server
    with traffic(port):
        for turn in range(5):
            path = tmp_path / f"{turn}.csv"
            process = subprocess.Popen(
                [*HUNTER, *no_daemon, "--save", path, "port", str(port)],
                stderr=subprocess.PIPE,
                text=True,
            )
            begun(process)
            until(functools.partial(lambda one: one.read_text().count("\n") > 1, path), 60)
            time.sleep(turn * 0.037)
            process.kill()
            process.communicate()
            text = path.read_text()
            assert text.endswith("\n")
            rows = list(csv.reader(text.splitlines()))
            assert len(rows) > 1 and all(len(row) == len(COLUMNS) for row in rows)
