# SPDX-License-Identifier: MIT
"""The configuration: one YAML mapping. Every mistake is reported with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from daemon.system.rights import group_id
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.errors import UsageError

__all__ = ["DEFAULT_GROUP", "RELOADABLE", "Config", "load", "parse"]

DEFAULT_GROUP = "packet-hunter"
"""If this group does not exist, root alone sees everything."""

_SHOWN = 80  # the most characters of a mistake
_SIZES = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
_SIZES |= {"kb": 1000, "mb": 1000**2, "gb": 1000**3}
_SIZES |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_TIMES = {"": 1, "ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)
_LOOPBACK = r"(127\.0\.0\.1|\[::1\]|localhost)"
_PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"


def _size(low: int, high: int) -> Meta:
    """A number of bytes."""
    allowed = f"a size such as 64MiB, from {_binary(low)} to {_binary(high)}"
    return Meta(ge=low, le=high, description=allowed, extra=_SIZES)


def _binary(size: int) -> str:
    power = max(0, (size.bit_length() - 1) // 10)
    return f"{size >> 10 * power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _time(low: float, high: float) -> Meta:
    """Seconds."""
    allowed = f"a time such as 30s, 10m, 12h, 7d, from {low:g} s to {high:g} s"
    return Meta(ge=low, le=high, description=allowed, extra=_TIMES)


def _number(low: int, high: int) -> Meta:
    return Meta(ge=low, le=high, description=f"a number from {low} to {high}")


_NAMEABLE = r"[^\0\ud800-\udfff]*\Z"  # YAML can write names that no file can have
_Path = Annotated[str, Meta(pattern=f"^/{_NAMEABLE}", description="an absolute path")]
_Group = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*\$?\Z", description="a group name")]
_Address = Annotated[
    str,
    Meta(
        pattern=rf"^(/{_NAMEABLE}|{_LOOPBACK}:{_PORT}\Z)",
        description="127.0.0.1:PORT, [::1]:PORT or an absolute path; PORT is 1 to 65535",
    ),
]


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes in bytes, times in seconds; `parse` accepts units ("64MiB", "7d").

    msgspec checks each value against the type of its field.
    """

    engine: Literal["auto", "module", "ebpf", "packet"] = "auto"
    socket: _Path = DEFAULT_SOCKET
    group: _Group = DEFAULT_GROUP
    """Members of this group see everything, as root does."""
    log: Literal["auto", "journal", "syslog", "stderr"] = "auto"
    """auto: journal under systemd, else stderr."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    cmdline: Literal["full", "program", "off"] = "program"
    """What is kept of command lines: full, program (the first word), off."""

    domains: Literal["dns", "sni", "off"] = "dns"
    """Sources of far ends' names: DNS; with sni also TLS to port 443; off."""

    queue_size: Annotated[int, _size(1 << 16, 16 << 30)] = 64 << 20
    """Room between receiver and worker."""
    ring_size: Annotated[int, _size(1 << 18, 1 << 30)] = 16 << 20
    """Room for packets that wait for engine packet, in the daemon's own network namespace."""
    client_queue_size: Annotated[int, _size(1 << 16, 1 << 30)] = 8 << 20
    """Room for each client, if the memory limit allows it for all (daemon.serve.bounds)."""
    max_clients: Annotated[int, _number(1, 16384)] = 512
    """A quarter is for users who see everything; another user has an eighth at most."""
    max_filters: Annotated[int, _number(1, 4096)] = 256
    """The most distinct filters at once."""
    max_processes: Annotated[int, _number(16, 1 << 20)] = 65536
    max_ports: Annotated[int, _number(16, 1 << 22)] = 262144

    history: _Path | None = None
    """SQLite file. Without it the history is only in memory."""
    history_flows: Annotated[int, _number(16, 1 << 24)] = 200_000
    """Flows in memory, about 220 bytes each."""
    history_age: Annotated[float, _time(1.0, 100 * 365.25 * 86400)] = 30 * 86400.0
    history_size: Annotated[int, _size(1 << 20, 1 << 44)] = 4 << 30
    """A flow takes some 30 bytes once its hour is sealed: a month of 100 flows/s takes 8 GiB."""
    history_free: Annotated[int, _size(0, 1 << 44)] = 0
    """Bytes that the history leaves free on its file system.

    If others fill that disk, the history shrinks. 0: only its own size counts."""
    flush_interval: Annotated[float, _time(0.05, 3600.0)] = 1.0

    sha256: Literal["on", "off"] = "off"
    """Hashes of the programs of all processes that use sockets. Each file is read once."""

    drop_reasons: Literal["on", "off"] = "on"
    """Why the kernel dropped packets, by socket; a BPF program that runs for dropped ones."""

    metrics: _Address | None = None
    """HOST:PORT on loopback, which all local users can read, or the absolute path of a UNIX socket
    for the group; none: off."""
    metrics_processes: Annotated[int, _number(1, 10000)] = 50
    """How many processes have counters of their own; all others are summed up as "other".

    When all are taken, the user with most of them gives way, but not root."""


RELOADABLE = frozenset(
    {
        "log_level",
        "cmdline",
        "client_queue_size",
        "max_clients",
        "max_filters",
        "history_age",
        "history_size",
        "history_free",
        "flush_interval",
        "metrics_processes",
        "group",
    }
)
"""Fields that SIGHUP changes. The others need a restart."""


def load(path: str) -> Config:
    """Read the file at `path`. Raises UsageError with file and line."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read(1 << 20), path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check --config") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse(text: str, name: str = "configuration") -> Config:
    """Return the Config in `text`. Raises UsageError whose message begins with `name`:LINE."""
    import yaml  # imported only if there is a file

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{name}:{line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{name}:1: not YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        return Config()
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{name}:1: expected 'name: value' lines")
    values: dict[str, Any] = {}
    known = get_type_hints(Config, include_extras=True)
    for key, value in root.value:
        place = f"{name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a collection"
            raise UsageError(f"{place}: unknown name {shown!r}; known: {', '.join(known)}")
        if key.value in values:
            raise UsageError(f"{place}: '{key.value}' is given twice")
        if not isinstance(value, yaml.ScalarNode):
            raise UsageError(f"{place}: '{key.value}' takes one value")
        # YAML reads a bare off as false; in this file words mean themselves
        null = value.tag == "tag:yaml.org,2002:null"
        try:
            values[key.value] = _value(known[key.value], None if null else value.value)
        except ValueError as error:
            raise UsageError(f"{place}: {key.value}: {error}") from None
    return Config(**values)


def _value(kind: Any, raw: str | None) -> Any:
    """Return `raw` as a value of `kind`. Raises ValueError that says what is allowed."""
    if type(None) in get_args(kind):
        if raw is None:
            return None
        kind = get_args(kind)[0]
    if raw is None:
        raise ValueError("it has no value")
    base, *metas = get_args(kind)
    meta = metas[0] if metas and isinstance(metas[0], Meta) else None
    given = raw if meta is None or meta.extra is None else _scaled(raw, meta.extra, base)
    try:
        value = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError:
        allowed = f"one of {', '.join(get_args(kind))}" if meta is None else meta.description
        shown = raw if len(raw) <= _SHOWN else f"{raw[:_SHOWN]}..."
        raise ValueError(f"{shown!r} is not {allowed}") from None
    if kind is _Group and value != DEFAULT_GROUP and group_id(value) is None:
        raise ValueError(f"there is no group '{raw}' here; make it with groupadd {raw}")
    return value


def _scaled(raw: str, units: Mapping[str, float], base: type) -> int | float | str:
    """Return `raw` as a number of the smallest unit; unchanged without one of `units`."""
    found = _QUANTITY.fullmatch(raw)
    if found is None or found[2].lower() not in units:
        return raw
    value = float(found[1]) * units[found[2].lower()]
    return int(value) if base is int and value < 1 << 63 else value
