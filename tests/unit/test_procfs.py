# SPDX-License-Identifier: MIT
"""/proc as it is told: socket tables, identities, details, whatever users put into them."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nlproto import UsageError
from nlproto.host import procfs
from nlproto.records import wire
from nlproto.records.process_event import command_line
from waiting import there


def test_socket_tables_give_addresses_in_network_order(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        "   0: 0100007F:0016 0200000A:8AE4 01 00000000:00000000 00:00000000 00000000"
        "  1000        0 12345 1 0000000000000000 20 4 30 10 -1\n"
    )
    (tmp_path / "udp6").write_text(
        "  sl  local_address ...\n"
        "  9: B80D0120000000000000000001000000:14E9 00000000000000000000000000000000:0000 07"
        " 00000000:00000000 00:00000000 00000000     0        0 77 2 0000000000000000 0\n"
    )
    tcp, udp = procfs.tables(tmp_path)
    assert (tcp["sport"], tcp["dport"], tcp["inode"], tcp["uid"], tcp["state"]) == (
        22,
        35556,
        12345,
        1000,
        1,
    )
    assert socket.inet_ntoa(tcp["saddr"][:4].tobytes()) == "127.0.0.1"
    assert socket.inet_ntoa(tcp["daddr"][:4].tobytes()) == "10.0.0.2"
    assert socket.inet_ntop(socket.AF_INET6, udp["saddr"].tobytes()) == "2001:db8::1"
    assert (udp["proto"], udp["sport"]) == (socket.IPPROTO_UDP, 5353)


def test_a_missing_or_broken_table_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text("head\nshort line\n")
    assert len(procfs.tables(tmp_path)) == 0


def fake_process(proc: Any, pid: int, comm: Any, ticks: Any, uid: int = 1000) -> None:
    home = proc / str(pid)
    home.mkdir()
    fields = " ".join(["S", *["0"] * 18, str(ticks), *["0"] * 20])
    (home / "stat").write_bytes(str(pid).encode() + b" (" + comm + b") " + fields.encode())
    (home / "status").write_text(f"Name:\tx\nUid:\t{uid}\t0\t0\t0\n")


def test_a_name_with_parentheses_and_newline_does_not_move_the_fields(tmp_path: Path) -> None:
    fake_process(tmp_path, 42, b"a) S (1\n2 3", 987654)
    found = procfs.owner(42, tmp_path)
    assert there(found).identity == procfs.Identity(42, 987654)
    assert (there(found).comm, there(found).uid) == (b"a) S (1\n2 3", 1000)


def test_nobody_is_none(tmp_path: Path) -> None:
    assert procfs.identity(1, tmp_path) is None
    assert procfs.owner(1, tmp_path) is None
    assert procfs.details(2**22 + 5, 1) is None


def test_start_times_agree_within_their_tick() -> None:
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert procfs.same_start(500 * tick, 500)
    assert procfs.same_start(501 * tick - 1, 500)
    assert not procfs.same_start(501 * tick, 500)


def test_ones_own_details_are_told() -> None:
    me = procfs.identity(os.getpid())
    found = procfs.details(os.getpid(), there(me).start_ns + 1, cmdline="full")
    assert there(found).exe == os.readlink("/proc/self/exe")
    assert "pytest" in there(found).cmdline
    assert (there(found).uid, there(found).ppid) == (os.getuid(), os.getppid())


def test_a_reused_pid_is_nobody() -> None:
    me = procfs.identity(os.getpid())
    assert procfs.details(os.getpid(), there(me).start_ns + 60_000_000_000) is None


def test_a_pid_that_changes_hands_while_it_is_read_is_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me = procfs.identity(os.getpid())
    answers = [procfs.Identity(there(me).tgid, there(me).start_ticks + 100)]
    monkeypatch.setattr(procfs, "identity", lambda pid, proc: answers.pop(0))
    assert procfs.details(os.getpid(), there(me).start_ns) is None
    assert not answers


def test_command_lines_are_cut_as_configured() -> None:
    start = there(procfs.identity(os.getpid())).start_ns
    full = there(procfs.details(os.getpid(), start, cmdline="full")).cmdline
    program = there(procfs.details(os.getpid(), start)).cmdline
    assert full.startswith(program) and len(full) > len(program) > 0
    assert there(procfs.details(os.getpid(), start, cmdline="off")).cmdline == ""
    with pytest.raises(UsageError, match="full, program, off"):
        procfs.details(os.getpid(), start, cmdline="some")


def test_a_name_cannot_pass_for_the_uid(tmp_path: Path) -> None:
    fake_process(tmp_path, 42, b"Uid:\t0\t0\t0\t0", 1)
    (tmp_path / "42" / "status").write_bytes(b"Name:\tUid:\t0\t0\t0\t0\nUid:\t1000\t7\t7\t7\n")
    assert there(procfs.owner(42, tmp_path)).uid == 1000


def test_a_process_that_is_called_as_the_uid_line_keeps_its_own() -> None:
    code = "import sys; open('/proc/self/comm', 'w').write('Uid:\\t0\\t0\\t0'); print(flush=True)"
    drop: dict[str, Any] = (
        {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    child = subprocess.Popen(
        ["python3", "-c", f"{code}; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **drop,
    )
    with child:
        there(child.stdout).readline()
        found = procfs.details(child.pid, there(procfs.identity(child.pid)).start_ns)
        assert there(found).comm == "Uid:\t0\t0\t0"
        assert there(found).uid == (65534 if drop else os.getuid())


def test_a_status_without_a_uid_is_nobody_and_not_root(tmp_path: Path) -> None:
    fake_process(tmp_path, 42, b"x", 1)
    (tmp_path / "42" / "status").write_bytes(b"Name:\tx\n")
    assert procfs.owner(42, tmp_path) is None


@pytest.mark.parametrize(
    ("raw", "program", "full"),
    [
        (b"/bin/sh\0-c\0exit\0", "/bin/sh", "/bin/sh -c exit"),
        (b"nginx: worker process\0\0\0", "nginx:", "nginx: worker process"),
        (b"one\n\x0c\x85two\0", "one\n\x0c\\x85two", "one\n\x0c\\x85two"),
        (b"\0", "", ""),
        (b"", "", ""),
        (b"\xff\xfe\0b\0", "\\xff\\xfe", "\\xff\\xfe b"),
    ],
)
def test_the_program_is_the_first_word_whatever_is_in_it(
    raw: bytes, program: str, full: str
) -> None:
    assert command_line(raw, "program") == program
    assert command_line(raw, "full") == full


def test_what_a_user_chose_is_kept_up_to_4096_bytes_and_marked_as_cut() -> None:
    child = subprocess.Popen(["A" * 120_000, "60"], executable="/bin/sleep")
    try:
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
            assert child.poll() is None
        start = there(procfs.identity(child.pid)).start_ns
        for mode in ("program", "full"):
            told = procfs.details(child.pid, start, cmdline=mode)
            assert len(there(told).cmdline.encode()) <= 4096
            assert there(told).cmdline.startswith("A" * 4000) and there(told).cmdline.endswith(
                "…[cut]"
            )
    finally:
        child.kill()
        child.wait()


@given(st.binary(max_size=3 * wire.MAX_TEXT))
@example(b"\xff" * 5000)
@example("€".encode() * 2000)
@example(b"a" * 4096)
def test_every_text_is_bounded_and_marked_only_when_it_was_cut(raw: bytes) -> None:
    text = wire.bounded(raw)
    assert len(text.encode()) <= wire.MAX_TEXT
    whole = raw.decode("utf-8", "backslashreplace")
    if len(whole.encode()) <= wire.MAX_TEXT:
        assert text == whole
    else:
        assert text.endswith("…[cut]") and whole.startswith(text.removesuffix("…[cut]"))


def test_a_removed_program_is_told_by_its_name(tmp_path: Path) -> None:
    copy = tmp_path / "a (deleted)"
    copy.write_bytes(Path("/bin/sleep").read_bytes())
    copy.chmod(0o755)
    child = subprocess.Popen([copy, "60"])
    try:
        start = there(procfs.identity(child.pid)).start_ns
        copy.unlink()
        assert there(procfs.details(child.pid, start)).exe == str(copy)
    finally:
        child.kill()
        child.wait()


anything = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.sampled_from(
            [b" ", b"\t", b"\n", b"(", b")", b":", b"\0", b"S", b"0", b"17", b"-1", b"9" * 30]
            + [b"\xc2\xb2", b"0100007F", b"Uid:\t", b"\x0b", b"\x0c", b"\r", b"\x1c", b"\x85"]
        ),
        max_size=60,
    ).map(b"".join),
)


@settings(max_examples=50)
@given(anything, anything, anything, anything)
@example(b"42 (a) S" + b" 0" * 17 + b" 5", b"Uid:\t\xc2\xb2\n", b"", b"a\x0c0::/b")
def test_no_bytes_in_proc_raise(stat: Any, status: Any, cmdline: Any, cgroup: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        proc = Path(name)
        home = proc / "42"
        home.mkdir()
        for file, raw in (
            ("stat", stat),
            ("status", status),
            ("cmdline", cmdline),
            ("cgroup", cgroup),
        ):
            (home / file).write_bytes(raw)
        assert procfs.pids(proc) == [42]
        procfs.identity(42, proc)
        procfs.owner(42, proc)
        procfs.details(42, 0, "full", proc)
        for table in ("tcp", "tcp6", "udp", "udp6"):
            (home / table).write_bytes(b"head\n" + stat + b"\n" + status)
        procfs.tables(home)


@settings(max_examples=50)
@given(
    st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63),
    st.binary(max_size=60).filter(lambda path: b"\n" not in path),
)
def test_what_the_kernel_writes_is_read_back(
    name: bytes, uid: int, ticks: int, path: bytes
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        proc = Path(directory)
        fake_process(proc, 42, name, ticks, uid)
        (proc / "42" / "cmdline").write_bytes(name + b"\0")
        (proc / "42" / "cgroup").write_bytes(b"1:name=systemd:/x\n0::/" + path + b"/y\n")
        assert procfs.owner(42, proc) == procfs.Owner(procfs.Identity(42, ticks), name, uid)
        found = procfs.details(42, ticks * procfs.TICK_NS, proc=proc)
        assert (there(found).comm, there(found).uid) == (wire.bounded(name), uid)
        assert there(found).cgroup == wire.bounded(b"/" + path + b"/y")
