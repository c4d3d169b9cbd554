# SPDX-License-Identifier: MIT
"""How each program ends when nobody takes what it writes, or somebody presses Ctrl-C early."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import nlproto
from waiting import there


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


PROGRAMS = {
    "hunter": "packet-hunter",
    "daemon": "packet-hunterd",
    "fleet.collect": "packet-hunter-collect",
    "fleet.export": "packet-hunter-export",
    "fleet.otlp": "packet-hunter-otlp",
}
programs = pytest.mark.parametrize("module", PROGRAMS)


def run(
    module: Any, *arguments: Any, flags: Any = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", *flags, "-m", module, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@programs
def test_each_says_its_version(module: Any) -> None:
    done = run(module, "-V", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{PROGRAMS[module]} {nlproto.__version__}\n"


@programs
@pytest.mark.parametrize("flags", [(), ("-u",)])
@pytest.mark.parametrize("asked", ["--version", "--help"])
def test_a_full_disk_is_one_line_and_a_reader_who_left_is_none(
    module: Any, asked: str, flags: tuple[Any, ...]
) -> None:
    with open("/dev/full", "w") as full:
        done = run(module, asked, stdout=full, flags=flags)
    words = "cannot write to standard output: No space left on device"
    assert (done.returncode, done.stderr) == (1, f"{PROGRAMS[module]}: {words}\n")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = run(module, asked, stdout=closed, flags=flags)
    assert (done.returncode, done.stderr) == (0, "")


@programs
def test_that_nobody_can_read_a_complaint_changes_no_exit_code(module: Any) -> None:
    command = [sys.executable, "-I", "-m", module, "--no-such-option"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full, timeout=60).returncode == 2
    assert subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], timeout=60).returncode == 2


@programs
def test_ctrl_c_before_it_has_begun_is_no_traceback(module: Any) -> None:
    """Of its own: Python itself, until it runs the program's first line, has one."""
    for wait in (0, 0.2):
        command = [sys.executable, "-I", "-X", "importtime", "-m", module, "--help"]
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_default_sigint,
        ) as process:
            told: list[Any] = []
            begun = False
            while not begun:  # what is imported after it: it has been run
                begun = bool(told) and "nlproto.running.interrupt" in told[-1]
                told.append(there(process.stderr).readline())
                assert told[-1]
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            told += there(process.stderr).readlines()
        assert process.returncode in (0, -signal.SIGINT)
        assert not [line for line in told if "Traceback" in line or "Exception" in line]


def test_that_no_thread_can_be_started_is_one_line(tmp_path: Path) -> None:
    """As on a machine that has no number for one more process."""
    there_is_no_room = (1 << 47, resource.RLIM_INFINITY)  # for the stack of a thread
    config = tmp_path / "daemon.yaml"
    config.write_text(f"history: {tmp_path}/history.db\n")
    done = run(
        "daemon",
        *("--engine", "packet", "--foreground"),
        *("--socket", tmp_path / "socket", "--config", config),
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, there_is_no_room),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "packet-hunterd: can't start new thread:"
        " raise the limit of tasks or memory (ulimit -u, -v, TasksMax=)"
    )
    assert "Traceback" not in done.stderr


@programs
def test_too_little_memory_is_one_line(module: Any) -> None:
    """What libraries need at most: at 150 MB each says its version."""
    said = set()
    for megabytes in (20, 40, 60, 80, 100, 150):
        limit = (megabytes * 1_000_000,) * 2
        limited = lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, limit)  # noqa: E731
        done = run(module, "-V", stdout=subprocess.DEVNULL, preexec_fn=limited)
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) in ((0, 0), (1, 1)), done.stderr
        said.update(lines)
    lacks = f"{PROGRAMS[module]}: not enough memory: raise the limit (ulimit -v, MemoryMax=)"
    assert lacks in said and all(one == lacks or "OpenBLAS" in one for one in said)


def test_a_limit_of_files_leaves_no_cut_modules(tmp_path: Path) -> None:
    """Python checks no write of its cache. A cut file there ended each later run."""
    cache = tmp_path / "cache"

    def says(**more: Any) -> subprocess.CompletedProcess[str]:
        flags = ("-X", f"pycache_prefix={cache}")
        return run("daemon", "-V", flags=flags, stdout=subprocess.PIPE, **more)

    limit = (1024, 1024)
    done = says(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 0
    assert not list(cache.rglob("daemon/**/*.pyc"))
    shutil.rmtree(cache)
    assert says().returncode == 0
    (cut,) = cache.rglob("daemon/service.*.pyc")
    cut.write_bytes(cut.read_bytes()[:1024])
    done = says()
    assert (done.returncode, done.stderr) == (1, f"packet-hunterd: {cut} is cut: remove it\n")


def test_the_daemon_ends_though_a_thread_of_it_hangs() -> None:
    """Python waits for the threads of every executor."""
    code = """
import concurrent.futures, runpy, sys, time
concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 600)
sys.argv = ["packet-hunterd", "--version"]
runpy.run_module("daemon", run_name="__main__")
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"packet-hunterd {nlproto.__version__}\n"
