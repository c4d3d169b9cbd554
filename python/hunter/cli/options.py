# SPDX-License-Identifier: MIT
"""The options of a command line: made once from the parsed words, then never changed."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from nlproto.client.frames import DEFAULT_SOCKET

__all__ = [
    "AnnotateOptions",
    "BY",
    "NEWS",
    "Choice",
    "CommandOptions",
    "DoctorOptions",
    "FLEET_BY",
    "FLEET_NEW",
    "FLEET_QUESTIONS",
    "FLEET_WORDS",
    "FleetOptions",
    "LiveOptions",
    "Origin",
    "SUBCOMMANDS",
    "ReportOptions",
    "StatsOptions",
    "TopOptions",
    "USED_BY",
    "UsageOptions",
    "WatchOptions",
    "WebOptions",
    "WhoOptions",
    "command_of",
]

BY = ("name", "unit", "container", "user", "host", "port")
"""What `who` sums up by."""

USED_BY = ("process", "unit", "container", "user", "domain")
"""What `usage` sums up by."""

NEWS = ("program", "destination", "listener")
"""What `watch` can report."""

FLEET_QUESTIONS = {
    "who": "flows and their processes, on which machine",
    "ends": "connections with the processes of both ends",
    "map": "which services talk to which",
    "new": "what was not seen before",
    "usage": "who used how much",
}
"""What `fleet` can be asked."""

FLEET_BY = ("process", "host", "unit", "container", "pod", "user", "domain")
"""What `fleet usage` sums up by; `fleet map` has no domain."""

FLEET_NEW = ("destination", "program", "listener")
"""What `fleet new` looks for."""
FLEET_WORDS = {
    "port": ("N", "of either end"),
    "pid": ("P", "of this process"),
    "pname": ("NAME", "of processes with this name"),
    "unit": ("UNIT", "of this systemd unit"),
    "container": ("C", "of this container: name or id"),
    "pod": ("POD", "of this pod"),
    "domain": ("NAME", "to the host with this name, or a name below it"),
    "netns": ("NS", "in network namespaces of this inode"),
}
"""Options of `fleet` that are also words of its filter."""

SUBCOMMANDS = {
    "top": "processes by rate, live",
    "who": "what listens, and which process owns, or owned, a port",
    "usage": "who used how much, in an hour or a month",
    "watch": "programs, destinations and listeners that were not seen before",
    "fleet": "the same questions to many machines",
    "web": "the same in a browser, with the history",
    "stats": "what the daemon has seen, and how well it names",
    "annotate": "write the owners into a capture of tcpdump or Wireshark",
    "report": "make a page of a saved capture",
    "doctor": "what works on this machine, and what to do about the rest",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which packets. All that is given must fit (hunter.cli.choice makes one Filter of it)."""

    filter: list[str]
    """Filter words."""
    filter_file: str | None
    interface: list[str] | None
    direction: str | None
    """"in", "out" or "inout"."""
    pid: list[str] | None
    pname: list[str] | None
    uid: list[str] | None
    netns: list[str] | None
    exe: list[str] | None
    cmdline: list[str] | None
    container: list[str] | None
    pod: list[str] | None
    unit: list[str] | None
    parent: list[str] | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where packets come from."""

    socket: str
    """The daemon's socket."""
    socket_given: bool
    """Whether the user named the socket: then that daemon is asked, and nothing else."""
    direct: bool
    engine: str
    """"auto", "module" or "packet"."""
    buffer: int | None
    """Bytes of engine packet's ring."""
    domains: str
    """Source of far ends' names without a daemon: "dns", "sni" or "off"."""
    read: list[str] | None
    """Saved captures; "-" is standard input."""


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """The main command."""

    choice: Choice
    origin: Origin
    argv: tuple[str, ...]
    """The command behind "--"."""
    count: int | None
    duration: float | None
    """Seconds."""
    all: bool
    numbers: bool
    quiet: int
    verbose: int
    times: int
    """How often -t was given."""
    json: bool
    summary: bool
    save: str | None
    """A file; "-" is standard output."""
    format: str | None
    print: bool
    rotate: int | None
    """Bytes."""
    keep: int | None
    """Files."""
    process_blocks: bool
    """In pcapng."""


@dataclass(frozen=True, slots=True)
class TopOptions:
    choice: Choice
    origin: Origin
    numbers: bool
    units: str
    interval: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class WhoOptions:
    """Whether nothing is asked about: then `who` shows what listens."""

    port: int | None
    proto: str | None
    host: str | None
    pid: int | None
    pname: str | None
    unit: str | None
    container: str | None
    pod: str | None
    domain: str | None
    since: float | None
    until: float | None
    """Seconds before now."""
    netns: str | None
    by: str | None
    """One of BY."""
    limit: int | None
    json: bool
    socket: str
    socket_given: bool

    @property
    def listening(self) -> bool:
        """Whether only listening sockets are asked for."""
        about = (self.port, self.host, self.pid, self.pname, self.domain)
        place = (self.unit, self.container, self.pod)
        asked = (*about, *place, self.since, self.until, self.by)
        return all(one is None for one in asked)


@dataclass(frozen=True, slots=True)
class UsageOptions:
    by: str
    """One of USED_BY."""
    since: float
    """Seconds before now."""
    limit: int | None
    json: bool
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class WatchOptions:
    kinds: list[str]
    """Of NEWS; none: all."""
    once: bool
    since: float | None
    """Seconds before now."""
    unseen: float
    """Seconds."""
    journal: bool
    webhook: str | None
    json: bool
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class FleetOptions:
    question: str
    """One of FLEET_QUESTIONS."""
    filter: list[str]
    store: str | None
    on: str | None
    port: int | None
    proto: str | None
    host: str | None
    pid: int | None
    pname: str | None
    user: str | None
    unit: str | None
    container: str | None
    pod: str | None
    domain: str | None
    netns: str | None
    since: float
    until: float
    """Seconds before now."""
    by: str | None
    """One of FLEET_BY."""
    of: str
    """One of FLEET_NEW."""
    days: int
    html: str | None
    limit: int | None
    json: bool
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class StatsOptions:
    json: bool
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class WebOptions:
    port: int
    """0: any free one."""
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class AnnotateOptions:
    input: str
    output: str
    netns: str | None
    process_blocks: bool
    socket: str
    socket_given: bool


@dataclass(frozen=True, slots=True)
class ReportOptions:
    input: list[str]
    output: str


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    socket: str
    socket_given: bool


CommandOptions = (
    LiveOptions
    | TopOptions
    | WhoOptions
    | UsageOptions
    | WatchOptions
    | FleetOptions
    | WebOptions
    | StatsOptions
    | AnnotateOptions
    | ReportOptions
    | DoctorOptions
)

_KINDS: dict[str, type[CommandOptions]] = {
    "live": LiveOptions,
    "top": TopOptions,
    "who": WhoOptions,
    "usage": UsageOptions,
    "watch": WatchOptions,
    "fleet": FleetOptions,
    "web": WebOptions,
    "stats": StatsOptions,
    "annotate": AnnotateOptions,
    "report": ReportOptions,
    "doctor": DoctorOptions,
}
_PARTS = {"choice": Choice, "origin": Origin}
_FILES = ("save", "output", "html")

T = TypeVar("T")


def command_of(name: str, parsed: argparse.Namespace, argv: tuple[str, ...] = ()) -> CommandOptions:
    """Return the options of command `name` ("live" or a subcommand) that argparse found."""
    found = vars(parsed) | {"argv": argv}
    given = found.get("socket")
    found |= {"socket": given or DEFAULT_SOCKET, "socket_given": given is not None}
    for file in _FILES:
        if found.get(file) == "/dev/stdout":
            found[file] = "-"
    return _made(_KINDS[name], found)


def _made(kind: type[T], found: dict[str, Any]) -> T:
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    parts: dict[str, Any] = {name: _made(_PARTS[name], found) for name in names if name in _PARTS}
    return kind(**parts, **{name: found[name] for name in names if name not in _PARTS})
