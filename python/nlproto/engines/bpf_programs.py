# SPDX-License-Identifier: MIT
"""Decides which programs of bpf/ run on this kernel: all, some, or none, and why."""

from __future__ import annotations

from pathlib import Path

from nlproto.kernel.bpf import NETFILTER, NoBpf, Object, has_target
from nlproto.kernel.refusal import why_refused_here

__all__ = [
    *("CGROUP", "NEEDED", "OBJECT", "PARTS", "TRACED"),
    *("choose_programs", "load_programs", "why_in_parts"),
]

OBJECT = Path(__file__).with_name("hunter.bpf.o")
"""File with the programs."""
PARTS = Path(__file__).with_name("hunter_parts.bpf.o")
"""File with the programs for kernels that refuse trampolines."""
NEEDED = {
    "security_socket_post_create",
    "security_sock_graft",
    "__receive_sock",
    "security_sk_free",
    "inet_release",
    "tcp_v4_rcv",
    "udp_rcv",
    "sk_filter_trim_cap",
    "ip_output",
}
"""Functions of the kernel that must be there: else names could be wrong."""
# Each of these functions removes descriptors; some kernels have another name for it. If one is
# missing, a program runs for each file, even for those open at a process's end. That is expensive.
_CLOSES = (
    ("close_fd", "file_close_fd"),
    ("__close_fd_get_file", "file_close_fd_locked"),
    ("do_dup2",),
)
_CLOSES_ALL = "locks_remove_posix"
_TRAMPOLINES = ("fentry/", "fexit/")
TRACED = (*_TRAMPOLINES, "tp_btf/")
"""Sections of programs that follow a function or a tracepoint."""
CGROUP = "cgroup"
"""Sections that begin so have programs for the root cgroup."""
_CALLS = "tp_btf/sys_enter"
# What reports packets and sockets where trampolines are refused, beside part_*.
_WITH_PARTS = {
    *("probe_fork", "probe_exec", "probe_exit", "probe_rename", "probe_ring", "reset_sent"),
    *("seed", "collect"),
}


def why_in_parts() -> str:
    """Load and unload the engine's programs. Returns "" if all of them run, else why only parts do.

    Raises NoBpf with the reason if not even the parts run.
    """
    parts, loaded = load_programs(1 << 16)
    loaded.close()
    return parts


def load_programs(ring_bytes: int) -> tuple[str, Object]:
    """Load all programs, or those for tracepoints and cgroups; then return a line that says so.

    Raises NoBpf with the reason if not even these can be loaded.
    """
    try:
        return "", _load_whole(ring_bytes)
    except NoBpf as error:
        if not PARTS.exists():
            raise
        why = str(error)
    opened = Object(PARTS)
    try:
        if _CALLS not in choose_programs(opened, whole=False):
            raise NoBpf(f"{why}; nor does it trace system calls")
        opened.set_entries("ring", ring_bytes)
        try:
            opened.load()
        except OSError as error:
            raise NoBpf(why) from error
    except BaseException:
        opened.close()
        raise
    parts = (
        f"engine ebpf runs in parts: {why}; what leaves is seen behind NAT, and each system call"
        " takes a little longer meanwhile"
    )
    return parts, opened


def _load_whole(ring_bytes: int) -> Object:
    """Return the object with every program whose function is there. Raises NoBpf."""
    if not OBJECT.exists():
        raise NoBpf("its programs were not compiled: install clang and run ./build.sh")
    opened = Object(OBJECT)
    try:
        known = choose_programs(opened, whole=True)
        lacking = NEEDED - {section.partition("/")[2] for section in known}
        if lacking:
            raise NoBpf(f"this kernel lacks {', '.join(sorted(lacking))}")
        opened.set_entries("ring", ring_bytes)
        try:
            opened.load()
        except OSError as error:
            raise NoBpf(why_refused_here(error)) from error
    except BaseException:
        opened.close()
        raise
    return opened


def choose_programs(opened: Object, *, whole: bool) -> set[str]:
    """Choose the programs to load. Returns the sections that have something to attach to.

    Raises NoBpf when the kernel does not describe itself.
    """
    known = _targets(opened)
    functions = {section.partition("/")[2] for section in known}
    if all(functions & {*ways} for ways in _CLOSES):
        known = {section for section in known if not section.endswith(_CLOSES_ALL)}
    elif whole and _CLOSES_ALL not in functions:
        raise NoBpf(f"this kernel lacks {_CLOSES_ALL}")
    for name, program in opened.programs.items():
        wanted = whole or name.startswith("part_") or name in _WITH_PARTS
        program.choose(wanted and program.section in known)
    return known


def _targets(opened: Object) -> set[str]:
    """Return the sections of its programs that have something to attach to here."""
    sections = {program.section for program in opened.programs.values()}
    traced = {section for section in sections if section.startswith((*TRACED, NETFILTER))}
    return sections - traced | has_target(traced)
