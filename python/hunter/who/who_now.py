# SPDX-License-Identifier: MIT
"""Owners of the present sockets without a daemon: from sock_diag and /proc."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import numpy as np

from hunter.cli.options import WhoOptions
from nlproto import NoPrivilege, UsageError
from nlproto.host import netns, procfs
from nlproto.host.containers import UNKNOWN, ContainerFiles
from nlproto.host.holders import Holders
from nlproto.host.sockdiag import SockDiag
from nlproto.host.sockets import fields, fitting, held, listening, unmapped
from nlproto.records import wire

__all__ = ["owners_now"]


def owners_now(options: WhoOptions) -> dict[str, Any]:
    """Return what the daemon's op "who" returns, as far as the kernel's tables know.

    `options`: port, proto, host, pid, pname, and whether it must listen. Raises UsageError.
    """
    if options.netns is not None and netns.find(options.netns).netns != netns.own():
        raise UsageError("--netns with another namespace needs the daemon: sudo packet-hunterd")
    network = None
    if options.host:
        try:
            network = ipaddress.ip_network(options.host, strict=False)
        except ValueError:
            raise UsageError(f"--host {options.host}: neither an address nor a network") from None
    proto = wire.PROTO_NUMBERS[options.proto] if options.proto else None
    table = unmapped(_sockets())
    mask = held(table) & fitting(table, options.port, proto, network)
    if options.listening:
        mask &= listening(table)
    table = table[mask]
    holders, files = Holders(), ContainerFiles()
    holders.walk()
    owners: list[dict[str, Any]] = []
    processes: dict[int, dict[str, Any]] = {}
    # listeners before others
    for index in np.lexsort((table["sport"], table["dport"] != 0)).tolist():
        owner = _owner(table[index], holders, options, processes, files)
        if owner is not None:
            owners.append(owner)
    return {
        "owners": owners,
        "owners_total": len(owners),
        "flows": [],
        "total": 0,
        "truncated": False,
        "complete": True,
        "since": time.time(),
        "processes": list(processes.values()),
    }


def _sockets() -> np.ndarray:
    try:
        with SockDiag() as diag:
            return diag.dump()
    except NoPrivilege:
        return procfs.tables()


def _owner(
    one: np.void,
    holders: Holders,
    options: WhoOptions,
    processes: dict[int, dict[str, Any]],
    files: ContainerFiles,
) -> dict[str, Any] | None:
    found = holders.find(int(one["inode"]))
    named = [
        {
            "pid": owner.identity.tgid,
            "start_ns": owner.identity.start_ns,
            "comm": wire.text(owner.comm),
            "uid": owner.uid,
        }
        for owner in found
    ]
    if options.pid and options.pid not in [owner["pid"] for owner in named]:
        return None
    if options.pname and options.pname[:15] not in [owner["comm"] for owner in named]:
        return None
    for owner in named:
        pid, start = int(str(owner["pid"])), int(str(owner["start_ns"]))
        details = procfs.details(pid, start) if pid not in processes else None
        if details is not None:
            processes[pid] = {
                name: getattr(details, name)
                for name in "tgid start_ns comm exe cmdline unit container uid user ppid".split()
            }
            called = files.find(details.container, details.cgroup) if details.container else UNKNOWN
            processes[pid] |= {
                "container_name": called.name,
                "image": called.image,
                "pod": called.pod,
                "parents": [{"pid": one.pid, "comm": one.comm} for one in details.parents],
            }
    if not named and not (options.port or options.listening):
        return None
    first = (
        named[0] if named else {"pid": None, "start_ns": None, "comm": "", "uid": int(one["uid"])}
    )
    pid_of_first = first["pid"]
    known = processes.get(int(str(pid_of_first))) if pid_of_first is not None else None
    return (
        fields(netns.own(), one) | first | {"exe": known["exe"] if known else "", "holders": named}
    )
