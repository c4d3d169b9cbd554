# SPDX-License-Identifier: MIT
"""Cgroup paths: which systemd unit and which container a process is in. Users cannot forge it.

The owner of a cgroup chooses the names below it, with any byte but NUL, newline and slash. So only
the place counts: systemd and runtimes put a unit or container into directories in which root alone
can make others.

Sources: kernel/cgroup/cgroup.c (proc_cgroup_show), systemd's src/basic/cgroup-util.c
(cg_path_get_unit, cg_path_get_user_unit, cg_escape).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["CgroupPlace", "container_of", "only_root_makes", "path_of", "place_of", "unit_of"]

MOUNTS = "/sys/fs/cgroup"

OnlyRoot = Callable[[str], bool | None]
"""Maps the path of a cgroup to whether root alone can make others in it; None: cannot be seen."""


class CgroupPlace(NamedTuple):
    """The unit and container of a process; "" for none.

    `unit` of a user's manager is "user@1000.service/app.service", never "app.service" alone.
    `container` is "runtime:id", of a user's own runtime "podman:user@1000/4f1c0d2e9a3b".
    Hexadecimal ids are cut to the 12 digits that people type; lxc and nspawn have names.
    """

    unit: str
    container: str


NOWHERE = CgroupPlace("", "")


def path_of(raw: bytes) -> tuple[str, bytes]:
    """Return (hierarchy, path) from the content of /proc/PID/cgroup; ("", b"") if there is none.

    This is the v2 path (hierarchy ""). On v1 it is the path in systemd's hierarchy, or else the
    longest. With both, v1 counts for processes in a runtime's own v2 cgroup: it may have moved
    containers there alone. The " (deleted)" of a removed v2 cgroup, which only a zombie can have,
    is left out.
    """
    paths: dict[str, bytes] = {}
    for line in raw.split(b"\n"):
        _, colon, rest = line.partition(b":")
        controllers, second, path = rest.partition(b":")
        if colon and second and path.startswith(b"/"):
            name = os.fsdecode(controllers)
            paths[name] = path if name else path.removesuffix(b" (deleted)")
    preferred = ["", "name=systemd"]
    slice, _, unit = paths.get("", b"").rpartition(b"/")
    if slice == b"/system.slice" and os.fsdecode(unit) in _RUNTIMES:
        preferred.reverse()
    for name in preferred:
        if len(paths.get(name, b"")) > 1:
            return name, paths[name]
    if not paths:
        return "", b""
    longest = max(paths, key=lambda name: len(paths[name]))
    return longest, paths[longest]


def only_root_makes(hierarchy: str, mounts: str = MOUNTS, proc: str = "/proc") -> OnlyRoot:
    """Return a function that says, from the directories of `hierarchy`, who can make cgroups."""
    mount = _mount(hierarchy, mounts, proc)

    def look(path: str) -> bool | None:
        try:
            found = os.lstat(mount + path) if mount else None
        except (OSError, ValueError):
            found = None
        if found is None:
            return None
        return found.st_uid == 0 and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    return look


def _mount(hierarchy: str, mounts: str, proc: str) -> str:
    """Return where a hierarchy is mounted, or "". Tries systemd's place, then mountinfo."""
    names = [hierarchy.removeprefix("name=")] if hierarchy else ["unified", ""]
    for place in (f"{mounts}/{name}".rstrip("/") for name in names):
        if os.path.exists(f"{place}/cgroup.procs"):
            return place
    try:
        with open(f"{proc}/self/mountinfo", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return ""
    for line in lines:
        mounted, _, kind = line.partition(b" - ")
        fields, options = mounted.split(b" "), kind.split(b" ")
        if len(fields) < 6 or len(options) < 3 or fields[3] != b"/":
            continue
        if options[0] == b"cgroup2" if not hierarchy else hierarchy in _words(options[2]):
            return os.fsdecode(
                re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8) & 255]), fields[4])
            )
    return ""


def _words(options: bytes) -> set[str]:
    """Return the parts of an options field that could name a v1 hierarchy."""
    words = os.fsdecode(options).split(",")
    controllers = [word for word in words if word not in ("rw", "ro") and "=" not in word]
    return {*words, ",".join(controllers)}


def place_of(path: str, only_root: OnlyRoot = lambda path: None) -> CgroupPlace:
    """Return the place of a cgroup path that begins at the root of its hierarchy.

    With `only_root`, a subtree given away by chown cannot forge the answer. If it knows nothing,
    places that systemd and the runtimes never give away are trusted.
    """
    parts = [part for part in path.split("/") if part]
    first = _slices(parts, 0)
    if first == len(parts) or parts[0] == "..":  # outside of this cgroup namespace
        return NOWHERE

    def made_by_root(index: int, proven: bool = False) -> bool:
        """Return whether root made parts[index]; with `proven`, only if that can be seen."""
        path = ""
        for part in parts[:index]:
            path += f"/{part}"
            if not (seen := only_root(path)) and (proven or seen is False):
                return False
        return True

    if not made_by_root(first):
        return NOWHERE
    unit = _unit(parts[first])
    if not unit:
        return CgroupPlace("", _of_runtime(parts, first, made_by_root))
    manager = _MANAGER.fullmatch(unit)
    if manager:
        return _of_user(manager[1], unit, parts, first + 1)
    container = _of_unit(unit)
    if not container and first + 1 < len(parts):
        # the subtree was delegated to a service, which names what is in it; these services run as
        # root
        if unit in _RUNTIMES or made_by_root(first + 1, proven=True):
            container = _of_name(parts[first + 1])
    return CgroupPlace(unit, container)


def unit_of(cgroup: str) -> str:
    """Return the unit of a cgroup path from its text alone, "" for none."""
    return place_of(cgroup).unit


def container_of(cgroup: str) -> str:
    """Return the container of a cgroup path from its text alone, "" for none."""
    return place_of(cgroup).container


# systemd

_UNIT = re.compile(r"[\w:.\\-][\w:.\\@-]*\.(?:service|scope|socket|mount|swap)", re.ASCII)
_SLICE = re.compile(r"((?:[\w:.\\]+-)*)[\w:.\\]+\.slice", re.ASCII)
_MANAGER = re.compile(r"user@([0-9]{1,10})\.service")
_MAX_UNIT = 255


def _unescaped(name: str) -> str:
    """Remove the prefix that systemd adds where a name could be a kernel file's ("cpu.service")."""
    return name.removeprefix("_")


def _slices(parts: list[str], at: int) -> int:
    """Return the index of the first part from `at` on that is no slice; a-b.slice is in a.slice."""
    above = ""
    while at < len(parts):
        name = _unescaped(parts[at])
        found = _SLICE.fullmatch(name)
        if found is None or found[1] != above or len(name) > _MAX_UNIT:
            break
        above = name.removesuffix(".slice") + "-"
        at += 1
    return at


def _unit(part: str) -> str:
    name = _unescaped(part)
    return name if _UNIT.fullmatch(name) and len(name) <= _MAX_UNIT else ""


# Containers

_ID = r"([0-9a-f]{64})"
_UNITS = (
    ("docker", re.compile(rf"docker-{_ID}\.scope")),
    ("podman", re.compile(rf"libpod-{_ID}\.scope")),
    ("containerd", re.compile(rf"cri-containerd-{_ID}\.scope")),
    ("crio", re.compile(rf"crio-{_ID}\.scope")),
    ("nspawn", re.compile(r"systemd-nspawn@(.+)\.service")),
    ("machine", re.compile(r"machine-(.+)\.scope")),
    ("container", re.compile(rf"(?!(?:libpod|crio)-conmon-).+-{_ID}\.scope")),
)
_NAMES = (
    ("podman", re.compile(rf"libpod(?:-payload)?-{_ID}")),
    ("crio", re.compile(rf"crio-{_ID}")),
    ("containerd", re.compile(rf"kubepods[^:]*:cri-containerd:{_ID}")),
    ("container", re.compile(_ID)),
)
_PATHS = (
    ("docker", re.compile(rf"/docker/{_ID}(?:/|$)")),
    ("podman", re.compile(rf"/libpod_parent/libpod-{_ID}(?:/|$)")),
    ("lxc", re.compile(r"/lxc(?:/|\.payload[./])([^/]+)")),
    ("crio", re.compile(rf"/kubepods(?:/[a-z]+)?/pod[^/]+/crio-{_ID}(?:/|$)")),
    ("kubernetes", re.compile(rf"/kubepods(?:/[a-z]+)?/pod[^/]+/{_ID}(?:/|$)")),
)
"""Places from the root of the hierarchy on, without systemd."""
_RUNTIMES = {
    *("containerd.service", "docker.service", "kubelet.service"),
    *("k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service"),
}


def _named(runtime: str, name: str) -> str:
    return f"{runtime}:{name[:12] if re.fullmatch('[0-9a-f]{64}', name) else name}"


def _of(known: tuple[tuple[str, re.Pattern[str]], ...], name: str) -> str:
    for runtime, pattern in known:
        found = pattern.fullmatch(name)
        if found:
            return _named(runtime, found[1])
    return ""


def _of_unit(unit: str) -> str:
    return _of(_UNITS, unit)


def _of_name(part: str) -> str:
    return _of(_NAMES, part)


def _of_user(uid: str, manager: str, parts: list[str], at: int) -> CgroupPlace:
    """Below user@UID.service that user chooses every name."""
    first = _slices(parts, at)
    unit = _unit(parts[first]) if first < len(parts) else ""
    container = ""
    for part in parts[first:]:
        runtime, _, name = (_of_unit(_unit(part)) or _of_name(part)).partition(":")
        if runtime:
            container = f"{runtime}:user@{uid}/{name}"
            break
    return CgroupPlace(f"{manager}/{unit}" if unit else manager, container)


def _of_runtime(parts: list[str], first: int, made_by_root: Callable[[int, bool], bool]) -> str:
    """A container whose runtime does not use systemd. `first` slices are above it."""
    if first == 0:
        path = "/" + "/".join(parts)
        for runtime, pattern in _PATHS:
            found = pattern.match(path)
            if found:
                index = path.count("/", 0, found.start(1)) - 1
                return _named(runtime, found[1]) if made_by_root(index, False) else ""
    for index in range(first, len(parts)):
        container = _of_name(parts[index])
        if container:
            if parts[0] == "kubepods.slice":
                container = container.replace("container:", "kubernetes:")
            # /NAME/ID can be of any runtime; deeper parts may be in a subtree that was given away
            return container if made_by_root(index, index > first + 1) else ""
    return ""
