# SPDX-License-Identifier: MIT
"""No memory: each allocation of a load, and those of the hot path, fail on a kernel made to fail.

Documentation/fault-injection: `fail-nth` fails a task's next but n allocation; failslab and
fail_page_alloc fail those whose call chain passes through the module's code.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from attribution.recorder import Recorder
from sockets import LOOPBACK, listening
from vmtest.kernlog import KernelLog, problems

from nlproto.kernel.netlink import Sniffer
from nlproto.records.wire import lib

pytestmark = pytest.mark.usefixtures("loopback_is_up")

DEBUG = Path("/sys/kernel/debug")
INJECTORS = ("failslab", "fail_page_alloc")
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_FINIT_MODULE = 313
STEP = 1 if os.environ.get("PACKET_HUNTER_LONG") else 7
"""Which allocations of a load fail: with PACKET_HUNTER_LONG each, else each seventh."""
TALK = """
import os, socket, sys
for _ in range(60):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        client.sendall(b"x" * 20000)
        got = 0
        while got < 20000:
            got += len(peer.recv(20000))
        child = os.fork()
        if not child:
            peer.sendall(b"y")
            os._exit(0)
        assert client.recv(1) == b"y"
        os.waitpid(child, 0)
        client.close(); peer.close()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("::1", 0))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"z", receiver.getsockname())
        assert receiver.recv(9) == b"z"
print("whole")
"""


@pytest.fixture(scope="module", autouse=True)
def injectors() -> Iterator[None]:
    """Faults are quiet and reach whatever allocates, page allocations without waiting too."""
    if not DEBUG.joinpath("tracing").exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", str(DEBUG)], check=True)
    if not all((DEBUG / name).exists() for name in INJECTORS):
        pytest.skip("a kernel with fault injection is needed: 6.1-debug")
    for name in INJECTORS:
        _set(name, {"verbose": 0, "ignore-gfp-wait": "N", "probability": 0, "times": -1})
    _set("fail_page_alloc", {"min-order": 0, "ignore-gfp-highmem": "N"})
    yield


def _set(injector: str, values: dict[str, int | str]) -> None:
    for name, value in values.items():
        with suppress(FileNotFoundError):  # not every injector has every file
            (DEBUG / injector / name).write_text(str(value))


def _load_failing(module: int, nth: int) -> tuple[int, bool]:
    """Load while allocation `nth` of it fails; errno of the load, and whether one did fail."""
    switch = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    try:
        os.pwrite(switch, str(nth).encode(), 0)
        result = LIBC.syscall(SYS_FINIT_MODULE, module, b"", 0)
        error = ctypes.get_errno() if result else 0
        left = int(os.pread(switch, 20, 0))
        os.pwrite(switch, b"0", 0)
    finally:
        os.close(switch)
    return error, left == 0


def _a_packet_is_named() -> None:
    with listening() as seen, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((LOOPBACK, 0))
        port = receiver.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (LOOPBACK, port))
    assert set(seen.to_port(port, lib.SNIFFER_DIR_IN)["tgid"]) == {os.getpid()}


@pytest.mark.patience(3600)
def test_a_load_that_finds_no_memory_fails_cleanly(
    module_file: Path, unloaded: None, kernel_log: KernelLog
) -> None:
    """Each allocation in turn; a load that can do without one may go on, and then names.

    The kernel itself warns when it has no memory for a module's static keys.
    """
    module = os.open(module_file, os.O_RDONLY | os.O_CLOEXEC)
    refused: set[int] = set()
    borne, nth, reached = 0, 1, True
    try:
        while reached:
            error, reached = _load_failing(module, nth)
            if error:
                refused.add(error)
                assert not Path("/sys/module/sniffer").exists()
            else:
                borne += reached
                subprocess.run(["rmmod", "sniffer"], check=True)
            nth += STEP
        assert LIBC.syscall(SYS_FINIT_MODULE, module, b"", 0) == 0
        _a_packet_is_named()
    finally:
        os.close(module)
    said = [line for line in problems(kernel_log.read()) if "kernel/jump_label.c" not in line]
    assert said == []
    print(f"{nth - STEP} allocations, each {STEP}. failed; {borne} loads bore it; errors {refused}")
    assert nth > 50
    assert refused <= {errno.ENOMEM, errno.EINVAL, errno.ENOENT, errno.EAGAIN}, refused
    assert errno.ENOMEM in refused


ENOUGH = 1_000_000
"""Faults that an injector may inject. It counts its `times` down."""


@contextmanager
def failing(percent: int) -> Iterator[Callable[[], int]]:
    """Allocations below the module's code fail, so many of a hundred; says how many did."""
    sections = Path("/sys/module/sniffer/sections")
    starts = sorted(
        int(path.read_text(), 16)
        for path in sections.iterdir()
        if path.name.startswith(".text") or path.name.startswith(".noinstr")
    )
    size = int(Path("/sys/module/sniffer/coresize").read_text())
    with ExitStack() as ends:
        for name in INJECTORS:
            chain = {"require-start": starts[0], "require-end": starts[0] + size}
            _set(name, {"stacktrace-depth": 32, **chain, "interval": 1, "times": ENOUGH})
            assert (DEBUG / name / "require-start").exists()
            ends.callback(_set, name, {"probability": 0})
            _set(name, {"probability": percent})
        yield lambda: sum(ENOUGH - int((DEBUG / name / "times").read_text()) for name in INJECTORS)


@pytest.mark.patience(1200)
@pytest.mark.parametrize("percent", [100, 30])
def test_packets_pass_and_the_account_closes_where_the_module_has_no_memory(
    loaded: None, percent: int
) -> None:
    """What could not be told is counted as lost, and nobody is named by guess."""
    with Sniffer() as sniffer:
        before = sniffer.counters().copy()
        with Recorder("module") as recorder:
            recorder.read(0)
            with failing(percent) as failed:
                talk = subprocess.Popen([sys.executable, "-c", TALK], stdout=subprocess.PIPE)
                while talk.poll() is None:
                    recorder.read(0.1)
                assert talk.stdout is not None
                assert talk.stdout.read() == b"whole\n"
                failures = failed()
            time.sleep(0.1)
            records = recorder.finish()
            faults = [
                line for line in recorder.faults(records, lossy=True) if "nothing was" not in line
            ]
        after = sniffer.counters()
    lost = int(after["lost_alloc"]) - int(before["lost_alloc"])
    others = {
        int(tgid)
        for tgid in np.unique(records["tgid"])
        if tgid and not _is_kin(int(tgid), talk.pid)
    }
    print(f"{failures} allocations failed: {len(records)} records read, {lost} lost")
    assert faults == []
    assert failures > 0
    # records share few pages, which are used again: of these perhaps none failed
    assert lost > 0 or percent < 100
    assert others <= {os.getpid()}
    _a_packet_is_named()


def _is_kin(tgid: int, ancestor: int) -> bool:
    """Was it made by the program that talked? Its children have the next pids."""
    return ancestor <= tgid <= ancestor + 200
