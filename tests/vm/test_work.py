# SPDX-License-Identifier: MIT
"""What work the module does, counted by kprobes on functions of its own: no time is measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from attribution.catalog import load
from attribution.run import perform
from attribution.workers import BINARIES, compile_workers
from sockets import cookie_of, insert, known_socket, udp_receiver

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import Sniffer
from waiting import until

pytestmark = pytest.mark.usefixtures("loopback_is_up")

TRACING = Path("/sys/kernel/tracing")
compile_workers(BINARIES)


@contextmanager
def counting(*functions: str, condition: str = "") -> Iterator[Counter[str]]:
    """Counts calls of the module's functions while the block runs, if they meet a condition.

    The condition may be on `third`, the third argument, a byte.
    """
    if not (TRACING / "kprobe_events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=True)
    symbols = [line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()
               if line.endswith("[sniffer]")]  # fmt: skip
    for name in functions:
        if name not in symbols:
            pytest.skip(f"the compiler left no {name}()")
    events = TRACING / "kprobe_events"
    events.write_text("".join(f"p:work/{n} sniffer:{n} third=$arg3:u8\n" for n in functions))
    counts: Counter[str] = Counter()
    try:
        if condition:
            for name in functions:
                (TRACING / "events/work" / name / "filter").write_text(condition)
        (TRACING / "trace").write_text("")
        (TRACING / "events/work/enable").write_text("1")
        yield counts
        (TRACING / "events/work/enable").write_text("0")
        for line in (TRACING / "trace").read_text().splitlines():
            for name in functions:
                counts[name] += f" {name}: " in line
    finally:
        (TRACING / "events/work/enable").write_text("0")
        events.write_text("")


def test_who_sends_on_what_is_not_his_is_searched_once(loaded: None, module_file: Path) -> None:
    """A firewall's daemon (NFQUEUE): its descriptors are gone through once a flow, not a packet."""
    for _ in range(3):  # on a busy machine it moves to other processors, and is searched there too
        with counting("use_find_fd", condition="third == 1") as counts:
            result = perform(load()["queued_to_user_space"], "module", BINARIES, str(module_file))
        if "unable" in result:
            pytest.skip(f"this machine cannot play it: {result['unable']}")
        assert not result["faults"]
        # half of the records are of packets that go out; requests and answers take turns
        assert result["packets"] > 40
        if counts["use_find_fd"] <= result["packets"] / 4:
            break
    assert 0 < counts["use_find_fd"] <= result["packets"] / 4


def test_nothing_is_walked_where_nothing_happens(loaded: None) -> None:
    """The collector looks at what has ended; at all entries once a minute, not each second."""
    idle = False
    for _ in range(3):  # the minute may be up
        with counting("sniffer_owner_bucket", "sniffer_descriptors_next_process") as counts:
            time.sleep(3)
        idle |= not sum(counts.values())
    assert idle


def test_threads_forks_and_exits_walk_no_processes(loaded: None) -> None:
    """A program of many threads that has sockets of its own forks and ends: nobody is asked."""
    script = (
        "import os, socket, threading\n"
        "sockets = [socket.socket(2, 2) for _ in range(50)]\n"
        "for one in sockets: one.bind(('127.0.0.1', 0))\n"
        "threads = [threading.Thread(target=sockets[n].getsockname) for n in range(8)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "if not os.fork(): os._exit(0)\n"
        "os.wait()\n"
        "os._exit(0)\n"
    )
    with counting("sniffer_descriptors_next_process", "holders_settle") as counts:
        subprocess.run([sys.executable, "-c", script], check=True)
    assert counts["sniffer_descriptors_next_process"] == 0
    assert counts["holders_settle"] <= 50, "once a socket, when their user ends"


def test_a_ring_that_takes_many_files_is_looked_at_once(loaded: None) -> None:
    """io_uring_register() of file after file: no look at all sockets with each."""
    script = (
        "import ctypes, os, socket, struct, sys\n"
        "call = ctypes.CDLL(None).syscall\n"
        "ring = call(425, 8, ctypes.create_string_buffer(120))\n"
        "if ring < 0: sys.exit(77)\n"
        "empty = (ctypes.c_int * 64)(*[-1] * 64)\n"
        "assert not call(427, ring, 2, empty, 64)\n"
        "sockets = [socket.socket(2, 2) for _ in range(64)]\n"
        "for one in sockets: one.bind(('127.0.0.1', 0))\n"
        "for place, one in enumerate(sockets):\n"
        "    number = ctypes.c_int(one.fileno())\n"
        "    update = struct.pack('=IIQ', place, 0, ctypes.addressof(number))\n"
        "    assert call(427, ring, 6, ctypes.create_string_buffer(update), 1) == 1\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with counting("holders_settle") as counts:
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout and child.stdin
        if not child.stdout.readline():
            assert child.wait() == 77, "it failed; its words are above"
            pytest.skip("no io_uring on this kernel")
    child.stdin.close()
    child.wait()
    assert counts["holders_settle"] < 64 * 8


def test_the_thread_that_sends_is_written_down_for_a_reader_only(
    module_file: Path, unloaded: None
) -> None:
    """Threads of one server share that line of memory: without a reader it stays as it is.

    While sockets stay shared, sends are probed without a reader. The first send after that
    begins shows who uses the socket, and notes its thread. Later ones do not.
    """
    insert(module_file)
    target, shared = udp_receiver(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with Sniffer() as sniffer, closing(target), closing(shared):

        def send() -> None:
            shared.sendto(b"x", target.getsockname())

        def tid() -> int:
            return int(known_socket(sniffer, cookie_of(shared))[0]["tid"])

        def another_is_noted() -> bool:
            thread = threading.Thread(target=send)
            thread.start()
            thread.join()
            return tid() != os.getpid()

        send()
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        try:
            until(another_is_noted, what="telling of sends while a socket is shared")
            other = tid()
            send()
            assert tid() == other
            with ModuleEngine(("packets",)):
                send()
                assert tid() == os.getpid()
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
