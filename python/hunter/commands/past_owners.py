# SPDX-License-Identifier: MIT
"""Finds in the daemon's history who owned the ends of a flow at a moment, and if it is certain.

A tuple is not unique. Another network namespace can have the same one at the same time. A
process can take over a tuple that another has just left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hunter.formats.captures import CapturedEnd, Flow
from nlproto.client.frames import MAX_WAITING
from nlproto.host.netns import Namespace

__all__ = ["OwnersThen", "Client", "PastOwners"]

_MAX_FLOWS = 100_000  # the most flows remembered
_LIMIT, _MAX_LIMIT = 100, 10_000  # entries of one flow: asked for at first, and at most

_SLACK_S = 0.5
"""How far the capture's and the history's times may differ: both are taken on the packet's way."""
_NEAR_S = 0.05
"""They rarely differ more. An owner this near may be the right one."""
_SAME_S = 0.005
"""Two stamps of one packet, where no queue lies between."""

_ENDS = ("local", "remote")
PastEntry = dict[str, Any]
"""One flow of the history, as in the answer to op "history"."""


_Pair = Flow
"""A flow without a direction: its lower end first."""


class Client(Protocol):
    """The part of the daemon's client that this needs."""

    def pipeline(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]: ...


class OwnersThen(NamedTuple):
    """`entries` has one entry for each possible process. Several, or not `certain`: ambiguous."""

    entries: list[PastEntry]
    certain: bool = True
    namespaces: frozenset[int] = frozenset()
    """The namespace of the flow at that time, if there are several."""


class PastOwners:
    """Remembers answers about up to _MAX_FLOWS flows.

    `at`: where the capture was made; None: not known.
    """

    def __init__(self, client: Client, at: Namespace | None = None) -> None:
        self._client = client
        self._place = at
        self._past: dict[_Pair, list[PastEntry]] = {}
        self._cut: set[_Pair] = set()
        self._exe: dict[tuple[int, int], str] = {}
        self._begun: dict[_Pair, tuple[CapturedEnd, int, float]] = {}
        self.cut = 0
        """Flows with more entries than the daemon returns."""

    def learn(self, flows: Iterable[Flow]) -> None:
        """Ask the daemon about flows that are not known yet. Raises Error."""
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
        """A SYN with this sequence number passed: later packets belong to another connection."""
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
        groups: dict[int, list[PastEntry]] = {}
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

    def exe(self, entry: PastEntry) -> str:
        """Return the path of an entry's process; "" if it is not known."""
        return self._exe.get((entry["pid"], entry["start_ns"]), "")


class _Settled(NamedTuple):
    entries: list[PastEntry]
    certain: bool
    nobody: bool
    """Note packets that had no owner."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """When a packet passed, and when its connection began, as far as known."""

    time_s: float | None
    begun_s: float | None

    def fits(self, entry: PastEntry, slack_s: float = _SLACK_S) -> bool:
        if self.time_s is None:
            return True
        return bool(entry["first"] - slack_s <= self.time_s <= entry["last"] + slack_s)

    def settle(self, entries: Sequence[PastEntry]) -> _Settled:
        """Return which process of one namespace it is, of the entries that fit."""
        if self.begun_s is not None:
            entries = [one for one in entries if one["last"] >= self.begun_s - _SAME_S]
        named = [one for one in entries if one["pid"] is not None]
        nobody = len(named) < len(entries)
        near = [one for one in named if self.fits(one, _NEAR_S)]
        by_process: dict[tuple[int, int], list[PastEntry]] = {}
        for one in near or named:
            by_process.setdefault((one["pid"], one["start_ns"]), []).append(one)
        found = [max(some, key=_newest) for some in by_process.values()]
        certain = len(found) == 1 and self._certain(near or named, bool(near), nobody)
        return _Settled(found, certain, nobody)

    def _certain(self, entries: Sequence[PastEntry], near: bool, nobody: bool) -> bool:
        """Return whether it is the only process near that time.

        While its socket lived, the tuple was its own. Packets shortly before or after are its own
        too, unless packets without an owner passed then: these may be of another process that ended
        too soon. A SYN in the capture tells the two apart.
        """
        if any("ambiguous" in one["flags"] for one in entries):
            return False
        if any(self.fits(one, _SAME_S) for one in entries):
            return self.time_s is not None or not nobody
        if self.time_s is not None and self.begun_s is not None:
            if any(one["first"] <= self.time_s and self.begun_s <= one["last"] for one in entries):
                return True
        return near and not nobody


def _newest(entry: PastEntry) -> float:
    return float(entry["last"])


def _merge(groups: Sequence[tuple[int, _Settled]]) -> OwnersThen:
    """Join the answers of all namespaces in which the flow was then."""
    groups = [(netns, one) for netns, one in groups if one.entries or one.nobody]
    if len(groups) == 1:
        return OwnersThen(groups[0][1].entries, groups[0][1].certain)
    entries: dict[tuple[int, int], PastEntry] = {}
    for _, group in groups:
        entries.update({(one["pid"], one["start_ns"]): one for one in group.entries})
    certain = len(entries) == 1 and all(group.entries and group.certain for _, group in groups)
    return OwnersThen(list(entries.values()), certain, frozenset(netns for netns, _ in groups))


def _became(entry: PastEntry, local: CapturedEnd, remote: CapturedEnd) -> bool:
    """Return whether NAT makes, or made, these addresses from its ends."""
    became = [(entry.get(f"nat_{one}"), entry.get(f"nat_{one[0]}port")) for one in _ENDS]
    return became == [local, remote]


def _is(entry: PastEntry, local: CapturedEnd, remote: CapturedEnd) -> bool:
    return (entry["local"], entry["lport"]) == local and (entry["remote"], entry["rport"]) == remote


def _pair(flow: Flow) -> _Pair:
    proto, source, target = flow
    return (proto, source, target) if source <= target else (proto, target, source)
