# SPDX-License-Identifier: MIT
"""/proc as text: socket tables, cgroup paths, containers, identities."""

import os
import socket

import pytest

from nlproto import UsageError, procfs

ID = "4f1c0d2e9a3b" + "0" * 52


@pytest.mark.parametrize(
    ("cgroup", "unit", "container"),
    [
        ("/", "", ""),
        ("/system.slice/ssh.service", "ssh.service", ""),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", ""),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.service",
            "app-x.service",
            "",
        ),
        (f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "docker:4f1c0d2e9a3b"),
        (f"/docker/{ID}", "", "docker:4f1c0d2e9a3b"),
        (f"/machine.slice/libpod-{ID}.scope", f"libpod-{ID}.scope", "podman:4f1c0d2e9a3b"),
        (
            f"/machine.slice/libpod-{ID}.scope/container",
            f"libpod-{ID}.scope",
            "podman:4f1c0d2e9a3b",
        ),
        (
            f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
            f"cri-containerd-{ID}.scope",
            "containerd:4f1c0d2e9a3b",
        ),
        (
            f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope",
            f"crio-{ID}.scope",
            "crio:4f1c0d2e9a3b",
        ),
        (f"/kubepods/burstable/pod12/{ID}", "", "kubernetes:4f1c0d2e9a3b"),
        ("/lxc.payload.web/system.slice/nginx.service", "nginx.service", "lxc:web"),
        ("/lxc/web", "", "lxc:web"),
        (
            "/machine.slice/systemd-nspawn@db.service/payload",
            "systemd-nspawn@db.service",
            "nspawn:db",
        ),
        ("/machine.slice/machine-qemu1.scope", "machine-qemu1.scope", "machine:qemu1"),
    ],
)
def test_unit_and_container_are_read_from_the_cgroup_path(cgroup, unit, container):
    assert procfs.unit_of(cgroup) == unit
    assert procfs.container_of(cgroup) == container


def test_socket_tables_give_addresses_in_network_order(tmp_path):
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


def test_a_missing_or_broken_table_is_left_out(tmp_path):
    (tmp_path / "tcp").write_text("head\nshort line\n")
    assert len(procfs.tables(tmp_path)) == 0


def fake_process(proc, pid, comm, ticks, uid=1000):
    home = proc / str(pid)
    home.mkdir()
    fields = " ".join(["S", *["0"] * 18, str(ticks), *["0"] * 20])
    (home / "stat").write_bytes(str(pid).encode() + b" (" + comm + b") " + fields.encode())
    (home / "status").write_text(f"Name:\tx\nUid:\t{uid}\t0\t0\t0\n")


def test_a_name_with_parentheses_and_newline_does_not_move_the_fields(tmp_path):
    fake_process(tmp_path, 42, b"a) S (1\n2 3", 987654)
    found = procfs.owner(42, tmp_path)
    assert found.identity == procfs.Identity(42, 987654)
    assert (found.comm, found.uid) == (b"a) S (1\n2 3", 1000)


def test_nobody_is_none(tmp_path):
    assert procfs.identity(1, tmp_path) is None
    assert procfs.owner(1, tmp_path) is None
    assert procfs.details(2**22 + 5, 1) is None


def test_start_times_agree_within_their_tick():
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert procfs.same_start(500 * tick, 500)
    assert procfs.same_start(501 * tick - 1, 500)
    assert not procfs.same_start(501 * tick, 500)


def test_ones_own_details_are_told():
    me = procfs.identity(os.getpid())
    found = procfs.details(os.getpid(), me.start_ns + 1, cmdline="full")
    assert found.exe == os.readlink("/proc/self/exe")
    assert "pytest" in found.cmdline
    assert (found.uid, found.ppid) == (os.getuid(), os.getppid())


def test_a_reused_pid_is_nobody():
    me = procfs.identity(os.getpid())
    assert procfs.details(os.getpid(), me.start_ns + 60_000_000_000) is None


def test_a_pid_that_changes_hands_while_it_is_read_is_nobody(monkeypatch):
    me = procfs.identity(os.getpid())
    answers = [me, procfs.Identity(me.tgid, me.start_ticks + 100)]
    monkeypatch.setattr(procfs, "identity", lambda pid, proc: answers.pop(0))
    assert procfs.details(os.getpid(), me.start_ns) is None
    assert not answers


def test_command_lines_are_cut_as_configured():
    start = procfs.identity(os.getpid()).start_ns
    full = procfs.details(os.getpid(), start, cmdline="full").cmdline
    program = procfs.details(os.getpid(), start).cmdline
    assert full.startswith(program) and len(full) > len(program) > 0
    assert procfs.details(os.getpid(), start, cmdline="off").cmdline == ""
    with pytest.raises(UsageError, match="full, program, off"):
        procfs.details(os.getpid(), start, cmdline="some")
