# SPDX-License-Identifier: MIT
"""Who may talk to the module: root of the initial namespaces, and nobody else.

Each question is asked by a real process that has given its rights up, in a child.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import configure

from nlproto.errors import NoModule, NoPrivilege
from nlproto.kernel.netlink import PACKETS, PROCESSES, SNAPS, Listener, Sniffer

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_DUMPABLE = 4
NOBODY = 65534

COMMANDS: dict[str, Callable[[Sniffer], object]] = {
    "info": lambda sniffer: sniffer.info(),
    "counters": lambda sniffer: sniffer.counters(),
    "configure": lambda sniffer: configure(sniffer, flush_ms=20),
    "flush": lambda sniffer: sniffer.flush(),
    "socket": lambda sniffer: sniffer.socket(1),
    "dump of sockets": lambda sniffer: sniffer.sockets(),
    "dump of processes": lambda sniffer: sniffer.processes(),
}


def as_root() -> None:
    """Gives nothing up."""


def as_a_plain_user() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    LIBC.prctl(PR_SET_DUMPABLE, 1)  # its files in /proc are its own again


def as_root_of_a_user_namespace(further: int = 0) -> None:
    """unshare -Ur: every capability there, none outside."""
    as_a_plain_user()
    if LIBC.unshare(CLONE_NEWUSER | further):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {NOBODY} 1"),
        ("gid_map", f"0 {NOBODY} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    assert os.getuid() == 0


def as_root_of_a_user_and_network_namespace() -> None:
    """unshare -Urn."""
    as_root_of_a_user_namespace(CLONE_NEWNET)


def as_a_container_with_cap_net_admin() -> None:
    """The real capability, but in a network namespace of its own: the family is not there."""
    if LIBC.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def outcome(ask: Callable[[], object]) -> str:
    try:
        ask()
    except (NoPrivilege, NoModule) as error:
        return type(error).__name__
    return "allowed"


def join(group: str) -> None:
    with Listener((group,)):
        pass


def ask_everything() -> dict[str, str]:
    """What becomes of each command and each join."""
    found = {
        f"join {group}": outcome(functools.partial(join, group))
        for group in (PACKETS, PROCESSES, SNAPS)
    }

    def command(ask: Callable[[Sniffer], object]) -> None:
        with Sniffer() as sniffer:
            ask(sniffer)

    return found | {
        name: outcome(functools.partial(command, ask)) for name, ask in COMMANDS.items()
    }


def asked(become: Callable[[], None]) -> dict[str, str]:
    """ask_everything() in a child that became somebody else."""
    answer, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become()
            os.write(told, json.dumps(ask_everything()).encode())
            status = 0
        except BaseException:  # noqa: B036 - a forked process must not return into pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(told)
    with open(answer, "rb") as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return dict(json.loads(text))


@pytest.fixture(autouse=True)
def user_namespaces_are_allowed() -> None:
    switch = Path("/proc/sys/kernel/unprivileged_userns_clone")
    if switch.exists():
        switch.write_text("1")


def test_root_may_do_everything(loaded: None) -> None:
    assert set(asked(as_root).values()) == {"allowed"}


@pytest.mark.parametrize("become", [as_a_plain_user, as_root_of_a_user_namespace])
def test_without_the_real_cap_net_admin_every_command_and_join_is_refused(
    loaded: None, become: Callable[[], None]
) -> None:
    answers = asked(become)
    assert len(answers) == 3 + len(COMMANDS)
    assert set(answers.values()) == {"NoPrivilege"}, answers


@pytest.mark.parametrize(
    "become", [as_root_of_a_user_and_network_namespace, as_a_container_with_cap_net_admin]
)
def test_other_network_namespaces_have_no_such_family(
    loaded: None, become: Callable[[], None]
) -> None:
    answers = asked(become)
    assert len(answers) == 3 + len(COMMANDS)
    assert set(answers.values()) == {"NoModule"}, answers
