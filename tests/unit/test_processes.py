# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nlproto.host import procfs
from nlproto.host.procfs import Parent
from nlproto.records import wire
from nlproto.records.process_event import ProcessEvent
from nlproto.records.wire import lib
from nlproto.tables.processes import Processes
from nlproto.tables.shares import Payers
from recording import make_records
from waiting import there, until

SEEN, EXEC, EXIT = lib.SNIFFER_EVENT_SEEN, lib.SNIFFER_EVENT_EXEC, lib.SNIFFER_EVENT_EXIT


def _event(kind: Any, tgid: int = 2**22 + 5, start_ns: int = 77, **fields: Any) -> ProcessEvent:
    values: dict[str, Any] = dict(time_ns=9, cgroup_id=4, ppid=1, uid=1000, pidns=3, ns_tgid=2)
    values |= dict(comm="first", exe="/bin/first") | fields
    return ProcessEvent(tgid=tgid, start_ns=start_ns, event=kind, **values)


def test_a_process_that_is_gone_keeps_what_the_kernel_told() -> None:
    processes = Processes(procfs.details)
    processes.add_event(_event(SEEN))
    processes.add_event(_event(EXIT, time_ns=1234))
    process = processes.get(2**22 + 5, 77)
    assert (there(process).comm, there(process).exe, there(process).exit_ns) == (
        "first",
        "/bin/first",
        1234,
    )


@pytest.mark.parametrize(
    "mode, line", [("full", "/bin/first -x a"), ("program", "/bin/first"), ("off", "")]
)
def test_one_that_is_gone_keeps_its_command_line_and_parents(mode: str, line: str) -> None:
    processes = Processes(procfs.details, cmdline=mode)
    args = b"/bin/first\0-x\0a\0"
    parents = ((2**22 + 1, "sh"), (2**22 + 2, "make"))
    processes.add_event(_event(SEEN, args=args, args_len=len(args), parents=parents))
    processes.add_event(_event(EXIT))
    process = there(processes.get(2**22 + 5, 77))
    assert process.cmdline == line
    assert process.parents == (Parent(2**22 + 1, "sh"), Parent(2**22 + 2, "make"))


def test_the_kernel_tells_how_a_living_one_began_and_proc_what_did_not_fit() -> None:
    """It may have rewritten its command line, and its parent may have gone."""
    here = there(procfs.identity(os.getpid()))
    whole = there(procfs.details(here.tgid, here.start_ns, "full"))
    for size, line in ((4, "sh x"), (400, whole.cmdline)):
        processes = Processes(
            lambda pid, start_ns: procfs.details(pid, start_ns, "full"), cmdline="full"
        )
        told = dict(args=b"sh\0x", args_len=size, parents=((77, "cron"),), exe=whole.exe)
        processes.add_event(_event(SEEN, here.tgid, here.start_ns, **told))
        found = there(processes.get(here.tgid, here.start_ns))
        assert (found.cmdline, found.parents) == (line, (Parent(77, "cron"),))


def test_a_command_line_that_was_cut_says_so() -> None:
    processes = Processes(cmdline="full")
    process = processes.add_event(_event(SEEN, args=b"java\0-cp\0lib", args_len=9000))
    assert process.cmdline == "java -cp lib…[cut]"
    assert Processes().add_event(_event(SEEN, args=b"java\0-c", args_len=9000)).cmdline == "java"


def test_more_parents_than_the_kernel_tells_are_read() -> None:
    own = procfs.parents(os.getpid(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    told = [
        *((2**22 + n, "gone") for n in range(lib.SNIFFER_PARENTS - 1)),
        (own[0].pid, own[0].comm),
    ]
    processes = Processes(procfs.details)
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    processes.add_event(_event(SEEN, start_ns=now, parents=tuple(told)))
    process = there(processes.get(2**22 + 5, now))
    assert process.parents == (*(Parent(*one) for one in told[:-1]), *own)


def test_a_container_of_a_moment_is_known_from_what_the_kernel_told() -> None:
    processes = Processes(procfs.details)
    path = b"/system.slice/docker-" + b"4f1c0d2e9a3b" + b"0" * 52 + b".scope"
    for kind in (SEEN, EXIT):
        processes.add_event(_event(kind, cgroup=path))
    found = processes.get(2**22 + 5, 77)
    assert (there(found).cgroup, there(found).container) == (path.decode(), "docker:4f1c0d2e9a3b")


def test_proc_tells_better_where_a_living_process_is() -> None:
    here = procfs.identity(os.getpid())
    told = procfs.details(there(here).tgid, there(here).start_ns)
    processes = Processes(procfs.details)
    processes.add_event(
        _event(SEEN, there(here).tgid, there(here).start_ns, cgroup=b"/old.service")
    )
    processes.add_event(
        _event(EXIT, there(here).tgid, there(here).start_ns, cgroup=b"/old.service")
    )
    found = processes.get(there(here).tgid, there(here).start_ns)
    assert (there(found).cgroup, there(found).unit) == (there(told).cgroup, there(told).unit)


def test_a_living_process_gets_its_details_from_proc_once() -> None:
    identity = procfs.identity(os.getpid())
    asked = []

    def details(pid: int, start_ns: int) -> Any:
        asked.append(pid)
        return procfs.details(pid, start_ns, "full")

    processes = Processes(details)
    for _ in range(3):
        process = processes.add(os.getpid(), there(identity).start_ns)
    assert process.exe == os.path.realpath(sys.executable)
    assert process.cmdline
    assert process.uid == os.getuid()
    assert asked == [os.getpid()]


@pytest.mark.parametrize("by", ["records", "add"])
def test_one_that_a_look_met_is_found_by_name_at_once_and_read_when_it_is_used(by: str) -> None:
    """A look at 2,000 processes waited 0.3 s for what is in /proc about each."""
    here = there(procfs.identity(os.getpid()))
    asked = []

    def details(pid: int, start_ns: int) -> Any:
        asked.append(pid)
        return procfs.details(pid, start_ns, "full")

    processes = Processes(details)
    for _ in range(2):
        processes.meet(here.tgid, here.start_ns, "python", 0)
    assert [one.tgid for one in processes.find(name="python")] == [here.tgid]
    assert not asked
    for _ in range(2):
        if by == "add":
            processes.add(here.tgid, here.start_ns)
        else:
            processes.add_records(make_records({"tgid": here.tgid, "start_ns": here.start_ns}))
    assert asked == [here.tgid]
    processes.meet(here.tgid, here.start_ns, "python", 0)
    assert there(processes.get(here.tgid, here.start_ns)).exe == os.path.realpath(sys.executable)


def test_exec_is_followed(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        until(lambda: os.readlink(f"/proc/{child.pid}/exe").endswith("sleep"))
        start_ns = there(procfs.identity(child.pid)).start_ns
        processes = Processes(procfs.details)
        processes.add_event(_event(SEEN, child.pid, start_ns, comm="sh", exe="/bin/sh"))
        assert there(processes.get(child.pid, start_ns)).exe.endswith("sleep")
        told = _event(EXEC, child.pid, start_ns, comm="sleep", exe="/usr/bin/sleep")
        assert processes.add_event(told).comm == "sleep"
    finally:
        child.kill()
        child.wait()


def test_a_reused_pid_is_another_process() -> None:
    processes = Processes()
    processes.add_event(_event(SEEN, start_ns=1, comm="old"))
    processes.add_event(_event(SEEN, start_ns=2, comm="new"))
    assert there(processes.get(2**22 + 5, 1)).comm == "old"
    assert [p.comm for p in processes.find(pid=2**22 + 5)] == ["new", "old"]


def test_records_teach_processes_and_their_present_comm() -> None:
    processes = Processes()
    processes.add_records(make_records({"comm": b"one"}, {"tgid": 0}))
    assert len(processes) == 1
    processes.add_records(make_records({"comm": b"renamed"}))
    assert there(processes.get(100, 5_000_000_000)).comm == "renamed"


def test_the_start_in_clock_ticks_finds_the_start_in_nanoseconds() -> None:
    processes = Processes()
    exact = 5 * 10**9 + 1234
    processes.add(7, exact)
    assert processes.start_of(7, 5 * 10**9) == exact
    assert processes.start_of(7, 6 * 10**9) == 6 * 10**9
    assert processes.start_of(8, 5 * 10**9) == 5 * 10**9


@pytest.mark.parametrize("by", ["records", "event", "add"])
def test_a_process_that_proc_told_of_first_is_known_once(by: str) -> None:
    rough, exact = 5 * 10**9, 5 * 10**9 + 1234
    processes = Processes()
    processes.add(100, rough, "server", 7)
    if by == "records":
        processes.add_records(make_records({"tgid": 100, "start_ns": exact, "comm": b"server"}))
    elif by == "event":
        processes.add_event(_event(SEEN, tgid=100, start_ns=exact))
    else:
        processes.add(100, exact)
    processes.add(100, rough)
    [one] = processes.find(pid=100)
    assert one.start_ns == exact
    assert processes.get(100, rough) == one
    assert processes.start_of(100, rough) == exact
    assert len(processes) == 1
    processes.add_records(make_records({"tgid": 100, "start_ns": exact + 1}))
    assert len(processes) == 2  # one exact time is not another


def test_the_least_recently_used_go_first() -> None:
    processes = Processes(limit=3)
    for tgid in (1, 2, 3):
        processes.add(tgid, 1)
    processes.add(1, 1)
    processes.add(4, 1)
    assert processes.get(2, 1) is None
    assert processes.get(1, 1) is not None
    assert (len(processes), processes.evicted) == (3, 1)


def test_who_listens_is_told_of_each_change() -> None:
    told: list[Any] = []
    processes = Processes(on_change=told.append)
    processes.add_event(_event(SEEN))
    processes.add(2**22 + 5, 77)
    processes.add_event(_event(EXIT))
    assert [process.exit_ns for process in told] == [None, 9]


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"\x1b[31m", b"a\nb", b"[/red]", b"=1+1"])
def test_any_name_becomes_text_that_json_takes(raw: bytes) -> None:
    import msgspec

    processes = Processes()
    processes.add_records(make_records({"comm": raw}))
    process = processes.get(100, 5_000_000_000)
    assert there(process).comm == wire.text(raw)
    assert b"\n" not in msgspec.json.encode(process)


def test_a_flood_of_one_users_processes_evicts_that_users_alone() -> None:
    processes = Processes(limit=100)
    for tgid in range(1, 11):
        processes.add(tgid, 1, f"daemon{tgid}", uid=0)
    for tgid in range(1000, 2000):
        processes.add(tgid, 1, f"bomb{tgid % 7}", uid=1000)
    assert [p.tgid for p in processes.find() if p.uid == 0] == list(range(1, 11))
    assert len(processes) <= 100
    assert processes.get(1999, 1) is not None
    assert processes.evicted + len(processes) == 1010


def test_a_flood_through_many_subordinate_uids_is_one_users(tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text("1000:100000:65536\n")
    processes = Processes(limit=100, payers=Payers(str(subuid)))
    for tgid in range(1, 11):
        processes.add(tgid, 1, "sshd", uid=0)
        processes.add(100 + tgid, 1, "vim", uid=1001)
    for tgid in range(1000, 2000):
        processes.add(tgid, 1, "bomb", uid=100_000 + tgid)
    kept = processes.find()
    assert sum(p.uid == 0 for p in kept) == sum(p.uid == 1001 for p in kept) == 10


def test_long_strings_are_bounded_in_bytes_and_cost_their_owner() -> None:
    argv = "a" * 100_000
    found = SimpleNamespace(cmdline=argv)
    processes = Processes(lambda pid, start_ns: found if pid >= 1000 else None, limit=1000)
    for tgid in range(1, 11):
        processes.add(tgid, 1, "daemon", uid=0)
    for tgid in range(1000, 1200):
        processes.add(tgid, 1, "bomb", uid=1000)
        assert processes.bytes <= processes.max_bytes
    held = sum(sys.getsizeof(process.cmdline) for process in processes.find())
    assert held < processes.bytes < 1.1 * held
    assert sum(p.uid == 0 for p in processes.find()) == 10
    assert 5 < sum(p.uid == 1000 for p in processes.find()) < 25


def test_a_young_process_is_read_again_once_when_it_has_settled() -> None:
    """Managers move what they have forked into a cgroup; exec follows."""
    asked = []

    def details(pid: int, start_ns: int) -> SimpleNamespace:
        asked.append(pid)
        return SimpleNamespace(cgroup=f"/at/{len(asked)}", unit="", container="")

    processes = Processes(details)
    start_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert processes.add(7, start_ns).cgroup == "/at/1"
    assert processes.add(7, start_ns).cgroup == "/at/1"
    until(lambda: processes.add(7, start_ns).cgroup == "/at/2")
    processes.add(7, start_ns)
    processes.add(8, start_ns - 10**10)
    processes.add(8, start_ns - 10**10)
    assert asked == [7, 7, 8]


def test_records_of_a_young_process_have_it_read_again() -> None:
    asked = []

    def details(pid: int, start_ns: int) -> SimpleNamespace:
        asked.append(pid)
        return SimpleNamespace(cgroup=f"/at/{len(asked)}")

    processes = Processes(details)
    start_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    records = make_records(dict(tgid=7, start_ns=start_ns, comm=b"one"))
    processes.add_records(records)

    def both_asked() -> bool:
        processes.add_records(records)
        return len(asked) == 2

    until(both_asked)
    processes.add_records(records)
    assert asked == [7, 7] and there(processes.get(7, start_ns)).cgroup == "/at/2"


def test_a_new_comm_in_a_record_has_the_program_read_again() -> None:
    """Without the module nothing reports an exec."""
    script = "read go; exec sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as child:
        identity = procfs.identity(child.pid)
        processes = Processes(procfs.details)
        started = {"tgid": child.pid, "start_ns": there(identity).start_ns}
        processes.add_records(make_records(started | {"comm": b"sh"}))
        before = there(processes.get(child.pid, there(identity).start_ns)).exe
        there(child.stdin).write(b"\n")
        there(child.stdin).flush()
        until(lambda: there(procfs.owner(child.pid)).comm == b"sleep")
        processes.add_records(make_records(started | {"comm": b"sleep"}))
        found = processes.get(child.pid, there(identity).start_ns)
        child.kill()
    assert (there(found).comm, os.path.basename(there(found).exe)) == ("sleep", "sleep")
    assert there(found).exe != before
