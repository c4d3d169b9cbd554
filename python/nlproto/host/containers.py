# SPDX-License-Identifier: MIT
"""Name, image and pod of a container, from files that its runtime wrote.

No runtime is asked. Files of root's runtimes count only if root owns them. Files of a user's podman
or docker count only if that user owns them; they are opened below the user's home, through no link
and no mount.

Sources: moby container/container.go (config.v2.json), containerd core/runtime/v2 (bundle.go),
internal/cri/annotations, nerdctl pkg/labels, containers/storage containers.go (containers.json),
cri-o pkg/annotations, podman libpod/storage.go, man 1 systemd-escape.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from nlproto._host import lib
from nlproto.records.wire import bounded
from nlproto.running.budget import UserBudgets

__all__ = ["UNKNOWN", "Container", "ContainerFiles"]


class Container(NamedTuple):
    """Names of a container; "" for the unknown.

    `name` and `image` of a user's own runtime begin with "user@1000/"; `pod` is "NAMESPACE/NAME".
    """

    name: str = ""
    image: str = ""
    pod: str = ""


UNKNOWN = Container()
"""A container that no file describes."""

_MAX_FILE = 4 << 20
_MAX_USER_FILE = 1 << 20
"""The most bytes of a file; a longer one is not read."""
_KEPT = 4096
_AGAIN_S, _UNKNOWN_AGAIN_S = 60.0, 2.0
"""Time until a container is looked up again: it may be renamed, or its files may be incomplete."""
_MAX_NAMESPACES = 64
_USER_SHARE, _USERS_SHARE, _SAVED_NS = 50, 20, 250_000_000
"""Parts of the time, and what is saved of it, for the files of one user, and of all users."""

_DOCKER = ("var/lib/docker", "var/snap/docker/common/var-lib-docker")
_CONTAINERD = ("run/containerd", "run/k3s/containerd", "var/snap/microk8s/common/run/containerd")
_STORAGE = ("overlay", "vfs", "btrfs", "zfs")
"""Drivers of containers/storage. Each has directories of its own."""
_ID = re.compile("[0-9a-f]{64}")
_POD_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")

_NAME = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name")
_IMAGE = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
_POD = ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name")
_NAMESPACE = ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")


class _Config(msgspec.Struct):
    Image: str = ""
    Labels: dict[str, str] | None = None


class _Docker(msgspec.Struct):
    """config.v2.json."""

    Name: str = ""
    Config: _Config | None = None


class _Bundle(msgspec.Struct):
    """config.json of an OCI bundle."""

    annotations: dict[str, str] | None = None


class _Stored(msgspec.Struct):
    """One of containers.json."""

    id: str = ""
    names: list[str] | None = None
    metadata: str = ""


class _Metadata(msgspec.Struct):
    image: str = msgspec.field(default="", name="image-name")
    name: str = ""


class _DaemonJson(msgspec.Struct):
    root: str = msgspec.field(default="", name="data-root")


_WRONG = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


class ContainerFiles:
    """Names of containers. They are remembered at least as long as somebody asks for them.

    A user who makes files long loses names, and costs others little time. `root`: where the
    runtimes' directories are. `owner`: the uid whose files count. For any thread.
    """

    def __init__(self, root: str = "/", owner: int = 0) -> None:
        self._root = root
        self._owner = owner
        self._known: dict[tuple[str, str], tuple[Container, float]] = {}
        self._users = UserBudgets(_USER_SHARE, _USERS_SHARE, _SAVED_NS, time.monotonic_ns)

    def find(self, container: str, cgroup: str) -> Container:
        """Return the names of a process's container.

        `container`: as cgroups.place_of() returns it; `cgroup`: the path, with the whole id.
        """
        runtime, _, short = container.partition(":")
        user, slash, short = short.rpartition("/")
        whole = next((one for one in _ID.findall(cgroup) if one.startswith(short)), "")
        if not whole:
            name = _unescaped(short) if runtime in ("nspawn", "machine") else short
            return Container(f"{user}{slash}{name}")
        key = (user, whole)
        known, due = self._known.get(key, (UNKNOWN, 0.0))
        now = time.monotonic()
        if now >= due:
            # a container that is no longer in its files keeps its name
            known = self._read(user, whole) or known
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = known, now + (_AGAIN_S if any(known) else _UNKNOWN_AGAIN_S)
        return known

    def _read(self, user: str, whole: str) -> Container | None:
        if not user:
            found = _merged(self._of_root(whole))
            return found if any(found) else None
        try:
            uid = int(user.removeprefix("user@"))
            if not self._users.allows(uid):
                return None
            with self._users.spend(uid):
                found = _merged(self._of_user(uid, whole))
        except (ValueError, KeyError, OverflowError):
            return None
        if not any(found):
            return None
        name, image, _ = (one and f"{user}/{one}" for one in found)
        return Container(name, image)

    # Root's runtimes

    def _of_root(self, whole: str) -> Iterator[Container]:
        for place in (*_DOCKER, *self._data_root()):
            yield _of_docker(self._file(f"{place}/containers/{whole}/config.v2.json"))
        for place in _CONTAINERD:
            tasks = f"{place}/io.containerd.runtime.v2.task"
            for namespace in self._names(tasks):
                yield _of_bundle(self._file(f"{tasks}/{namespace}/{whole}/config.json"))
        for driver in _STORAGE:
            directory = f"{driver}-containers"
            bundle = f"run/containers/storage/{directory}/{whole}/userdata/config.json"
            yield _of_bundle(self._file(bundle))
            for kind in ("", "volatile-"):
                stored = f"var/lib/containers/storage/{directory}/{kind}containers.json"
                yield _of_storage(self._file(stored), whole)

    def _data_root(self) -> tuple[str, ...]:
        """Return where docker keeps its containers by its configuration."""
        try:
            path = msgspec.json.decode(self._file("etc/docker/daemon.json"), type=_DaemonJson).root
        except _WRONG:
            return ()
        return (path.lstrip("/"),) if os.path.isabs(path) else ()

    def _names(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(os.path.join(self._root, directory)))[:_MAX_NAMESPACES]
        except OSError:
            return []

    def _file(self, path: str) -> bytes:
        """Return the content of a file of root's; empty if there is none."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            file = os.open(os.path.join(self._root, path), flags)
        except (OSError, ValueError):
            return b""
        return _content(file, self._owner, _MAX_FILE)

    # A user's own

    def _of_user(self, uid: int, whole: str) -> Iterator[Container]:
        home = pwd.getpwuid(uid).pw_dir
        try:
            directory = os.open(
                os.path.join(self._root, home.lstrip("/")),
                os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC,
            )
        except (OSError, ValueError):
            return

        def file(path: str) -> bytes:
            opened = lib.host_open_beneath(directory, f".local/share/{path}".encode())
            return _content(opened, uid, _MAX_USER_FILE) if opened >= 0 else b""

        try:
            yield _of_docker(file(f"docker/containers/{whole}/config.v2.json"))
            for driver in _STORAGE:
                for kind in ("", "volatile-"):
                    stored = f"containers/storage/{driver}-containers/{kind}containers.json"
                    yield _of_storage(file(stored), whole)
        finally:
            os.close(directory)


def _content(file: int, owner: int, most: int) -> bytes:
    """Read and close a file that only `owner` and root can write."""
    try:
        found = os.fstat(file)
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_uid not in (0, owner)
            or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            or found.st_size > most
        ):
            return b""
        return os.read(file, most)
    except OSError:
        return b""
    finally:
        os.close(file)


def _merged(parts: Iterator[Container]) -> Container:
    """Join several answers; for each field the first known value counts."""
    found = UNKNOWN
    for part in parts:
        if any(part):
            found = Container(*(one or other for one, other in zip(found, part, strict=True)))
            if found.name and found.image:
                break
    return found


def _of_docker(raw: bytes) -> Container:
    try:
        told = msgspec.json.decode(raw, type=_Docker)
    except _WRONG:
        return UNKNOWN
    config = told.Config or _Config()
    labels = config.Labels or {}
    name = _first(labels, _NAME) or told.Name.removeprefix("/")
    return Container(_text(name), _text(config.Image), _pod(labels))


def _of_bundle(raw: bytes) -> Container:
    try:
        labels = msgspec.json.decode(raw, type=_Bundle).annotations or {}
    except _WRONG:
        return UNKNOWN
    return Container(_text(_first(labels, _NAME)), _text(_first(labels, _IMAGE)), _pod(labels))


def _of_storage(raw: bytes, whole: str) -> Container:
    if whole.encode() not in raw:
        return UNKNOWN
    try:
        stored = msgspec.json.decode(raw, type=list[_Stored])
    except _WRONG:
        return UNKNOWN
    for one in stored:
        if one.id == whole:
            try:
                more = msgspec.json.decode(one.metadata, type=_Metadata)
            except _WRONG:
                more = _Metadata()
            name = one.names[0] if one.names else more.name
            return Container(_text(name), _text(more.image))
    return UNKNOWN


def _first(labels: dict[str, str], names: tuple[str, ...]) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")


def _pod(labels: dict[str, str]) -> str:
    namespace, name = _first(labels, _NAMESPACE), _first(labels, _POD)
    both = _POD_PART.fullmatch(namespace) and _POD_PART.fullmatch(name)
    return f"{namespace}/{name}" if both else ""


def _text(value: str) -> str:
    return bounded(value.encode("utf-8", "backslashreplace"))


def _unescaped(name: str) -> str:
    """Undo systemd-escape: "web\\x2d1" is "web-1"."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda one: bytes.fromhex(one[1].decode()), name.encode())
    return bounded(raw)
