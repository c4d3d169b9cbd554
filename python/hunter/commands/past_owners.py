# SPDX-License-Identifier: MIT
"""Who owned the ends of a flow at a moment, by the daemon's history; certain, or said not to be.

A tuple is not unique: another network namespace can have the same at the same time, and a process
can take over a tuple that another has just left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hunter.formats.captures import End, Flow
from nlproto.client.frames import MAX_WAITING
from nlproto.host.netns import Namespace

__all__ = ["OwnersThen", "Client", "PastOwners"]

_MAX_FLOWS = 100_000  # remembered
_LIMIT, _MAX_LIMIT = 100, 10_000  # entries of one flow: asked for at first, given at most

_SLACK_S = 0.5
"""The capture's clock stamp and the history's may differ: both are taken on the packet's way."""
_NEAR_S = 0.05
"""They hardly ever differ by more. An owner who was that near may be who is meant."""
_SAME_S = 0.005
"""Two stamps of one packet, where no queue lies between."""

_ENDS = ("local", "remote")
Entry = dict[str, Any]
"""One flow of the history, as op "history" answers."""


_Pair = Flow
"""A flow without direction: its lower end first."""


class Client(Protocol):
    """What is needed of the daemon."""

    def pipeline(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]: ...


class OwnersThen(NamedTuple):
    """`entries` has one of each process that can be meant; several, or not `certain`: ambiguous."""

    entries: list[Entry]
    certain: bool = True
    namespaces: frozenset[int] = frozenset()
    """Where the flow was at that time, when there are several."""


class PastOwners:
    """Answers are remembered, up to _MAX_FLOWS flows.

    `at`: where the capture was made; None: not known.
    """

    def __init__(self, client: Client, at: Namespace | None = None) -> None:
        self._client = client
        self._place = at
        self._past: dict[_Pair, list[Entry]] = {}
        self._cut: set[_Pair] = set()
        self._exe: dict[tuple[int, int], str] = {}
        self._begun: dict[_Pair, tuple[End, int, float]] = {}
        self.cut = 0
        """Flows with more entries than the daemon gives."""

    def learn(self, flows: Iterable[Flow]) -> None:
        """Ask for the flows that are not known yet. Raises Error."""
        pairs = dict.fromkeys(map(_pair, flows))
        wanted = [pair for pair in pairs if pair not in self._past]
        if len(self._past) + len(wanted) > _MAX_FLOWS:
            self._past.clear()
            self._exe.clear()
            self._cut.clear()
            wanted = list(pairs)
        for at in range(0, len(wanted), MAX_WAITING):
            self._ask(wanted[at : at + MAX_WAITING], _LIMIT)

    def _ask(self, pairs: Sequence[_Pair], limit: int) -> None:
        questions = [
            ("history", {"proto": proto, "ends": ends, "limit": limit}) for proto, *ends in pairs
        ]
        more = []
        for pair, reply in zip(pairs, self._client.pipeline(questions), strict=True):
            self._past[pair] = reply["flows"]
            for process in reply["processes"]:
                self._exe[process["tgid"], process["start_ns"]] = process["exe"]
            if reply["truncated"]:
                more.append(pair)
        if more and limit < _MAX_LIMIT:
            self._ask(more, _MAX_LIMIT)
        elif more:
            self._cut.update(more)
            self.cut += len(more)

    def begin(self, flow: Flow, sequence: int, time_s: float | None) -> None:
        """A SYN with this sequence number passed: what comes now is of another connection."""
        pair, syn = _pair(flow), (flow[1], sequence)
        before = self._begun.get(pair)
        if time_s is None or (before is not None and before[:2] == syn):
            return
        if len(self._begun) >= _MAX_FLOWS:
            self._begun.clear()
        self._begun[pair] = (*syn, time_s)

    def at(self, flow: Flow, end: int, time_s: float | None) -> OwnersThen:
        """Return who owned the flow's source (1) or destination (2) at that Unix time."""
        pair = _pair(flow)
        near, far = (flow[1], flow[2]) if end == 1 else (flow[2], flow[1])
        begun = self._begun.get(pair)
        moment = _Moment(time_s, None if begun is None else begun[2])
        groups: dict[int, list[Entry]] = {}
        passed = set()
        for entry in self._past.get(pair, ()):
            if entry["proto"] != flow[0] or not moment.fits(entry):
                continue
            if entry["forwarded"]:
                passed.add(entry["netns"])
            elif _is(entry, near, far) or _became(entry, near, far):
                groups.setdefault(entry["netns"], []).append(entry)
        certain = pair not in self._cut
        if self._place is not None:
            here = self._place.netns
            certain &= time_s is None or time_s >= self._place.since_s - _SLACK_S
            if here in groups or here not in passed:
                groups = {here: groups.get(here, [])}
        found = _merge([(netns, moment.settle(group)) for netns, group in groups.items()])
        return found if certain else found._replace(certain=False)

    def exe(self, entry: Entry) -> str:
        """Return the path of an entry's process, "" where it is not known."""
        return self._exe.get((entry["pid"], entry["start_ns"]), "")


class _Settled(NamedTuple):
    entries: list[Entry]
    certain: bool
    nobody: bool
    """Packets were seen that had no owner."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """When a packet passed, and when the connection began that it belongs to, as far as known."""

    time_s: float | None
    begun_s: float | None

    def fits(self, entry: Entry, slack_s: float = _SLACK_S) -> bool:
        if self.time_s is None:
            return True
        return bool(entry["first"] - slack_s <= self.time_s <= entry["last"] + slack_s)

    def settle(self, entries: Sequence[Entry]) -> _Settled:
        """Which process of one namespace it is, of entries that fit."""
        if self.begun_s is not None:
            entries = [one for one in entries if one["last"] >= self.begun_s - _SAME_S]
        named = [one for one in entries if one["pid"] is not None]
        nobody = len(named) < len(entries)
        near = [one for one in named if self.fits(one, _NEAR_S)]
        by_process: dict[tuple[int, int], list[Entry]] = {}
        for one in near or named:
            by_process.setdefault((one["pid"], one["start_ns"]), []).append(one)
        found = [max(some, key=_newest) for some in by_process.values()]
        certain = len(found) == 1 and self._certain(near or named, bool(near), nobody)
        return _Settled(found, certain, nobody)

    def _certain(self, entries: Sequence[Entry], near: bool, nobody: bool) -> bool:
        """Whether it is the only process that was near.

        While its socket lived the tuple was its own. Packets shortly before or after are its own
        too, unless others without an owner passed then: they may have been another process's,
        which was gone too soon to be asked. A SYN in the capture tells one from the other.
        """
        if any("ambiguous" in one["flags"] for one in entries):
            return False
        if any(self.fits(one, _SAME_S) for one in entries):
            return self.time_s is not None or not nobody
        if self.time_s is not None and self.begun_s is not None:
            if any(one["first"] <= self.time_s and self.begun_s <= one["last"] for one in entries):
                return True
        return near and not nobody


def _newest(entry: Entry) -> float:
    return float(entry["last"])


def _merge(groups: Sequence[tuple[int, _Settled]]) -> OwnersThen:
    """One answer of those of all namespaces in which the flow was then."""
    groups = [(netns, one) for netns, one in groups if one.entries or one.nobody]
    if len(groups) == 1:
        return OwnersThen(groups[0][1].entries, groups[0][1].certain)
    entries: dict[tuple[int, int], Entry] = {}
    for _, group in groups:
        entries.update({(one["pid"], one["start_ns"]): one for one in group.entries})
    certain = len(entries) == 1 and all(group.entries and group.certain for _, group in groups)
    return OwnersThen(list(entries.values()), certain, frozenset(netns for netns, _ in groups))


def _became(entry: Entry, local: End, remote: End) -> bool:
    """Whether NAT makes, or made, these of its ends."""
    became = [(entry.get(f"nat_{one}"), entry.get(f"nat_{one[0]}port")) for one in _ENDS]
    return became == [local, remote]


def _is(entry: Entry, local: End, remote: End) -> bool:
    return (entry["local"], entry["lport"]) == local and (entry["remote"], entry["rport"]) == remote


def _pair(flow: Flow) -> _Pair:
    proto, source, target = flow
    return (proto, source, target) if source <= target else (proto, target, source)
