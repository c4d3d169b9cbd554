# SPDX-License-Identifier: MIT
"""Shows the findings of `who`: sums where rows would repeat, and the newest first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from hunter.cli.options import WhoOptions
from hunter.show import names
from hunter.show.console import TextRow, put
from hunter.show.programs import label, place, programs
from hunter.show.text import plain
from hunter.show.units import counted, duration
from nlproto.host import netns

__all__ = ["clock", "place_of", "service_of", "show"]

_ROWS = 50
"""The most rows of a table, unless --limit says otherwise."""
_ABOVE = 2
"""The most parents that are shown."""

Entry = Mapping[str, Any]
ProgramKey = tuple[Any, ...]


def show(
    answer: Mapping[str, Any],
    console: Console,
    now: float,
    options: WhoOptions,
    remembers: bool = True,
) -> None:
    """Print the reply of op "who"; `now` is Unix time, `remembers`: it came from a daemon."""
    owners, flows = answer["owners"], answer["flows"]
    limit = options.limit or _ROWS
    if not owners and not flows:
        if options.listening and answer["complete"]:
            console.print("nothing listens that you may see")
        else:
            console.print(_nobody(answer, now) if remembers else "nobody now")
        return
    if not answer.get("complete", True):
        console.print("the daemon is still reading the kernel's tables", style="dim")
    processes = {(one["tgid"], one["start_ns"]): one for one in answer["processes"]}
    rows = _now_rows(owners, processes, options)
    _put(console, "listening" if options.listening else "now", _NOW, rows, limit)
    _cut(console, "sockets", len(owners), answer.get("owners_total", len(owners)))
    seen = _seen_rows(without_legs(flows), processes, options, now)
    _put(console, "seen", _SEEN, seen, limit)
    _cut(console, "flows", len(flows), answer["total"])
    if answer.get("truncated") and (len(owners), len(flows)) == (
        answer.get("owners_total", len(owners)),
        answer["total"],
    ):
        console.print("there is more than one answer holds: ask for a process", style="dim")
    if answer.get("nat_cut") and not options.listening:
        console.print(
            "more connections were translated (NAT) than are known: who is behind may be missing",
            style="dim",
        )
    if options.listening:  # owner and place are in each row
        return
    _put(console, "processes", _PROCESSES, _process_rows(processes.values()), limit)


def _nobody(answer: Mapping[str, Any], now: float) -> str:
    if not answer["complete"]:
        return "the daemon is still reading the kernel's tables: ask again in a moment"
    since = answer["since"]
    return f"nobody, now or since {clock(since, now)}, which is as far back as is remembered"


def _put(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[TextRow], limit: int
) -> None:
    if not rows:
        return
    used = [i for i, name in enumerate(columns) if name not in _OPTIONAL or any(r[i] for r in rows)]
    shown = [[row[i] for i in used] for row in rows[:limit]]
    put(console, title, [columns[i] for i in used], shown, _NUMBERS)
    if len(rows) > limit:
        console.print(f"{len(rows) - limit:,} more: --limit {len(rows)}", style="dim")


def _cut(console: Console, what: str, shown: int, total: int) -> None:
    if total > shown:
        console.print(
            f"of {total:,} {what} these are the {shown:,} newest; --limit N looks at more",
            style="dim",
        )


_NOW = (
    "process",
    "socket",
    "nat",
    "state",
    "sockets",
    "dropped",
    "why",
    "user",
    "runs in",
    "netns",
    "shared with",
)
_SEEN = (
    *("process", "flow", "nat", "flows", "packets", "bytes", "rtt", "resent", "outcome", "domain"),
    *("first", "last", "netns", "how"),
)
_PROCESSES = ("process", "user", "started by", "runs in", "executable", "command")
_OPTIONAL = (
    *("nat", "state", "sockets", "flows", "domain", "netns", "shared with", "command", "runs in"),
    *("rtt", "resent", "outcome", "dropped", "why"),
)
_NUMBERS = ("sockets", "dropped", "flows", "packets", "bytes", "rtt", "resent")


def _name(text: str, known: bool = True) -> Text:
    return Text(text, style="bold green" if known else "yellow")


def _netns(number: int, since: float | None = None) -> str:
    return "" if number == netns.own() else plain(names.netns(number, since))


@dataclass(slots=True)
class _Ends:
    """Return both ends of one owner's flows or sockets; ports that differ become *."""

    proto: str
    local: str
    remote: str | None
    lports: set[int] = field(default_factory=set)
    rports: set[int | None] = field(default_factory=set)

    def text(self, between: str) -> str:
        local = f"{self.proto} {self.local}.{_port(self.lports)}"
        return local if self.remote is None else f"{local} {between} {self.remote}.{self._far()}"

    def _far(self) -> str:
        return _port({port for port in self.rports if port is not None})


@dataclass(slots=True)
class _Nat:
    """Return what NAT makes of both ends of flows or sockets: the addresses that differ."""

    near: set[tuple[str, int]] = field(default_factory=set)
    far: set[tuple[str, int]] = field(default_factory=set)

    def add(self, one: Entry) -> None:
        if one.get("nat_local") is None:
            return
        local = (one["local"], one["lport"]) if "local" in one else (one["address"], one["port"])
        near, far = (one["nat_local"], one["nat_lport"]), (one["nat_remote"], one["nat_rport"])
        if near != local:
            self.near.add(near)
        if far != (one["remote"], one["rport"]):
            self.far.add(far)

    def text(self) -> str:
        return names.nat(self._end(self.near), self._end(self.far))

    @staticmethod
    def _end(found: set[tuple[str, int]]) -> str:
        return f"{next(iter(found))[0]}.{_port({port for _, port in found})}" if found else ""


def nat_key(one: Entry, options: WhoOptions) -> tuple[Any, ...]:
    """Return the key of a row: the addresses, and the port of the service."""
    if one.get("nat_local") is None:
        return ()
    ports = service_of(one["nat_lport"], one["nat_rport"], options.port)
    return one["nat_local"], one["nat_remote"], *ports


def without_legs(flows: Sequence[Entry]) -> list[Entry]:
    """Leave out a forwarded flow that is also a process's connection."""
    known = {pair for flow in flows if flow["pid"] is not None for pair in _pairs(flow)[:2]}
    return [
        flow
        for flow in flows
        if not (flow["forwarded"] and flow.get("nat_local") and known & set(_pairs(flow)))
    ]


def _pairs(flow: Entry) -> list[tuple[Any, ...]]:
    """Yield the pairs of ends that a flow has, lower end first."""
    found = []
    for nat in ("", "nat_") if flow.get("nat_local") else ("",):
        ends = ((flow[f"{nat}{one}"], flow[f"{nat}{one[0]}port"]) for one in ("local", "remote"))
        found.append((flow["proto"], *sorted(ends)))
    return found


def _port(ports: set[int]) -> str:
    return str(next(iter(ports))) if len(ports) == 1 else "*"


def service_of(lport: int, rport: int | None, asked: int | None) -> tuple[int | None, int | None]:
    """Return (local, remote) ports, with only the service's; the other one is random."""
    if rport is None:
        return lport, None
    if asked in (lport, rport):
        return (lport, None) if lport == asked else (None, rport)
    return (lport, None) if lport <= rport else (None, rport)


def _now_rows(
    owners: Sequence[Entry], processes: Mapping[tuple[int, int], Entry], options: WhoOptions
) -> list[TextRow]:
    """A row for each owner, far host and state."""
    sums: dict[tuple[Any, ...], tuple[Entry, _Ends, dict[tuple[Any, ...], Entry], _Nat]] = {}
    for one in owners:
        others = sorted({(h["comm"], h["pid"]) for h in one["holders"] if h["pid"] != one["pid"]})
        port = service_of(one["port"], one.get("rport"), options.port)
        place = (one["netns"], one["proto"], one["address"], one.get("remote"), one["state"])
        key = (one["comm"], one["pid"], *place, *port, nat_key(one, options), tuple(others))
        ends = _Ends(one["proto"], one["address"], one.get("remote"))
        _, ends, sockets, nat = sums.setdefault(key, (one, ends, {}, _Nat()))
        nat.add(one)
        ends.lports.add(one["port"])
        ends.rports.add(one.get("rport"))
        sockets[one["cookie"], one["port"], one.get("rport")] = one
    rows: list[TextRow] = []
    for key, (one, ends, sockets, nat) in sums.items():
        listens = one["listening"] and one["proto"] == "tcp"
        who = "-" if one["pid"] is None else f"{plain(one['comm'])}.{one['pid']}"
        process = processes.get((one["pid"], one["start_ns"]))
        dropped = sum(socket.get("drops", 0) for socket in sockets.values())
        why: Counter[str] = Counter()
        for socket in sockets.values():
            why.update(socket.get("drop_reasons", {}))
        verb = "" if options.listening else "listens on " if listens else "has "
        rows.append(
            [
                _name(who, one["pid"] is not None),
                f"{verb}{ends.text('<>')}",
                nat.text(),
                "" if listens or options.listening else one["state"],
                f"{len(sockets):,}" if len(sockets) > 1 else "",
                f"{dropped:,}" if dropped else "",
                counted(why),
                "" if one.get("uid") is None else plain(names.user(one["uid"])),
                "" if process is None else plain(place_of(process)),
                _netns(one["netns"]),
                ", ".join(f"{plain(comm)}.{pid}" for comm, pid in key[-1]),
            ]
        )
    return rows


@dataclass(slots=True)
class _Sum:
    newest: Entry
    ends: _Ends
    pids: set[int] = field(default_factory=set)
    flows: set[tuple[int, int]] = field(default_factory=set)
    arrows: set[str] = field(default_factory=set)
    nat: _Nat = field(default_factory=_Nat)
    packets: int = 0
    bytes: int = 0
    retransmits: int = 0
    rtts: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    first: float = float("inf")

    def add(self, flow: Entry) -> None:
        if flow["last"] > self.newest["last"]:
            self.newest = flow
        self.nat.add(flow)
        self.ends.lports.add(flow["lport"])
        self.ends.rports.add(flow["rport"])
        self.flows.add((flow["lport"], flow["rport"]))
        if flow["pid"] is not None:
            self.pids.add(flow["pid"])
        self.packets += flow["packets_in"] + flow["packets_out"]
        self.bytes += flow["bytes_in"] + flow["bytes_out"]
        self.first = min(self.first, flow["first"])
        self.retransmits += flow.get("retransmits") or 0
        if flow.get("rtt") is not None:
            self.rtts.append(flow["rtt"])
        if flow.get("outcome"):
            self.outcomes[flow["outcome"]] += 1
        if flow["packets_in"]:
            self.arrows.add("<")
        if flow["packets_out"]:
            self.arrows.add(">")

    @property
    def arrow(self) -> str:
        if self.newest["forwarded"]:
            return "-"
        return "<>" if len(self.arrows) > 1 else "".join(self.arrows)


def _seen_rows(
    flows: Sequence[Entry],
    processes: Mapping[tuple[int, int], Entry],
    options: WhoOptions,
    now: float,
) -> list[TextRow]:
    """Yield a row for each program, far host and service, newest first."""
    program_of = _programs(flows, processes)
    sums: dict[tuple[Any, ...], _Sum] = {}
    for flow in flows:
        owner = program_of.get((flow["pid"], flow["start_ns"]), flow["how"])
        port = service_of(flow["lport"], flow["rport"], options.port)
        ends = (flow["proto"], flow["local"], flow["remote"])
        key: tuple[Any, ...] = (owner, flow["netns"], flow["forwarded"], *ends, *port)
        key += (flow.get("domain"), *nat_key(flow, options))
        sums.setdefault(key, _Sum(flow, _Ends(*ends))).add(flow)
    rows: list[TextRow] = []
    for one in sorted(sums.values(), key=lambda one: -one.newest["last"]):
        newest = one.newest
        rows.append(
            [
                _name(label(newest["comm"], one.pids) if one.pids else "-", bool(one.pids)),
                one.ends.text(one.arrow),
                one.nat.text(),
                f"{len(one.flows):,}" if len(one.flows) > 1 else "",
                f"{one.packets:,}",
                f"{one.bytes:,}",
                _time(one.rtts),
                f"{one.retransmits:,}" if one.retransmits else "",
                _outcomes(one.outcomes, len(one.flows)),
                plain(newest.get("domain", "")),
                clock(one.first, now),
                f"{clock(newest['last'], now)}, {_ago(now - newest['last'])}",
                _netns(newest["netns"], one.first),
                " ".join([newest["how"].replace("_", " "), *_uncertain(newest), *_behind(newest)]),
            ]
        )
    return rows


def _time(rtts: Sequence[float]) -> str:
    """Return the median round trip time."""
    if not rtts:
        return ""
    return duration(sorted(rtts)[len(rtts) // 2])


def _outcomes(found: Counter[str], flows: int) -> str:
    if flows == 1:
        return " ".join(found)
    return counted(found)


def _uncertain(flow: Entry) -> list[str]:
    return ["AMBIGUOUS"] if "ambiguous" in flow["flags"] else []


def _behind(flow: Entry) -> list[str]:
    """Return the proxy through which it was reached."""
    proxy = flow.get("behind")
    return [] if proxy is None else [f"behind {plain(proxy['comm'])}.{proxy['pid']}"]


def _programs(
    flows: Iterable[Entry], processes: Mapping[tuple[int, int], Entry]
) -> dict[tuple[int, int], ProgramKey]:
    """Yield the row of each process that has flows."""
    known = {}
    for flow in flows:
        if flow["pid"] is not None:
            key = (flow["pid"], flow["start_ns"])
            known[key] = (flow["comm"], processes[key]["exe"] if key in processes else "")
    return dict(programs(known))


def _process_rows(processes: Iterable[Entry]) -> list[TextRow]:
    known = {(one["tgid"], one["start_ns"]): one for one in processes}
    program_of = programs({key: (one["comm"], one["exe"]) for key, one in known.items()})
    rows: defaultdict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for key, one in sorted(known.items()):
        rows[(*program_of[key], one["uid"], place_of(one))].append(one)
    return [
        [
            _name(label(some[0]["comm"], {one["tgid"] for one in some})),
            "" if some[0]["uid"] is None else plain(names.user(some[0]["uid"])),
            _same(map(_parent, some)),
            plain(place_of(some[0])),
            plain(key[1]),
            plain(_command(some[0])),
        ]
        for key, some in rows.items()
    ]


def place_of(process: Entry) -> str:
    """Return what a process of an answer runs in. It may contain any character."""
    names = ("container", "container_name", "pod", "unit")
    return place(*(process.get(name, "") for name in names))


def _parent(process: Entry) -> str:
    """Return its parents; the pid alone if no more is known."""
    above = [f"{plain(one['comm'])}.{one['pid']}" for one in process.get("parents", ())[:_ABOVE]]
    return " < ".join(above) or str(process.get("ppid") or "")


def _same(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def _command(process: Entry) -> str:
    """Return its arguments, if the daemon keeps them."""
    words: str = process.get("cmdline", "")
    return words if " " in words else ""


def clock(moment: float, now: float) -> str:
    """Return a Unix time as people write it, with the date if it is not today's."""
    then, today = datetime.fromtimestamp(moment), datetime.fromtimestamp(now)
    return then.strftime("%H:%M:%S" if then.date() == today.date() else "%Y-%m-%d %H:%M:%S")


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
