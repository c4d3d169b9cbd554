# SPDX-License-Identifier: MIT
"""The two tables of hunter top: processes, and the flows or far ends of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from hunter.show.console import has_blocks
from hunter.show.names import nat, service
from hunter.show.rates import FlowRate, ProcessRate, TrafficMeter
from hunter.show.text import plain
from hunter.show.units import amount, counted, duration
from hunter.top.going import SocketGoing
from hunter.top.grid import Cell, Grid, GridColumn
from hunter.top.state import State

__all__ = ["FlowsView", "ProcessesView", "View", "bars", "sparkline"]

_BARS, _PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .,:-=+*#"


def bars() -> str:
    """Return the nine heights of a bar, in characters of this terminal."""
    return _BARS if has_blocks() else _PLAIN_BARS


def sparkline(history: Iterable[float], bars: str = _BARS) -> str:
    """Return a bar for each value; the highest has full height."""
    values = list(history)
    most = max(values, default=0.0)
    if not most:
        return bars[0] * len(values)
    return "".join(bars[-int(-value * 8 // most)] for value in values)


class View(Screen[None]):
    """A table that is filled again at each tick."""

    columns: ClassVar[Sequence[GridColumn]] = ()
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "find", "Find"),
        Binding("less_than_sign", "sort(-1)", "Sort", key_display="< >"),
        Binding("greater_than_sign", "sort(1)", show=False),
        Binding("s", "sort_by('sent')", "Sort by sent", show=False),
        Binding("r", "sort_by('received')", "Sort by received", show=False),
    ]

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.bars = bars()
        self.sorting = "rate"
        self.needle = ""
        self._ready = False

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield Input(placeholder="show rows with ...", id="needle")
        yield Grid(self.columns)
        yield Static(id="account", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(Input).display = False
        self.query_one(Grid).focus()
        self._ready = True
        self.call_after_refresh(self.show)

    def on_input_changed(self, event: Input.Changed) -> None:
        self.needle = event.value.lower()
        self.show()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.query_one(Grid).focus()

    def on_grid_header_clicked(self, event: Grid.HeaderClicked) -> None:
        if self.columns[event.column].sort:
            self.action_sort_by(self.columns[event.column].sort)

    def action_find(self) -> None:
        box = self.query_one(Input)
        box.display = True
        box.focus()

    def action_back(self) -> None:
        box = self.query_one(Input)
        if box.display:
            box.value = ""
            box.display = False
            self.query_one(Grid).focus()
        else:
            self.leave()

    def leave(self) -> None:
        """Escape without a search. It does nothing in the first view."""

    def action_sort(self, step: int) -> None:
        names = list(dict.fromkeys(column.sort for column in self.columns if column.sort))
        self.action_sort_by(names[(names.index(self.sorting) + step) % len(names)])

    def action_sort_by(self, name: str) -> None:
        self.sorting = name
        self.show()

    def items(self) -> Sequence[Any]:
        """Return all items, in order."""
        raise NotImplementedError

    def key(self, item: Any) -> Hashable:
        raise NotImplementedError

    def cells(self, item: Any) -> Sequence[Cell]:
        raise NotImplementedError

    def words(self, item: Any) -> str:
        """Return the text in which a search looks."""
        raise NotImplementedError

    def title_text(self) -> str:
        raise NotImplementedError

    def more_text(self) -> str:
        """Return the end of the title, which may be cut off."""
        return ""

    def show(self) -> None:
        """Fill the table, if it exists and the program is not about to end."""
        try:
            table = self.query_one(Grid)
            title, account = self.query_one("#title", Static), self.query_one("#account", Static)
        except NoMatches:
            return
        if not self._ready:
            return
        items, found = self.items(), ""
        if self.needle:
            items = [item for item in items if self.needle in self.words(item).lower()]
            found = f", {len(items):,} found"
        with self.app.batch_update():
            table.fill(items, self.key, self.cells)
            told = f"{self.title_text()}{found}, sorted by {self.sorting}"
            parts = (told, "PAUSED" if self.state.paused else "", self.more_text())
            title.update("  ".join(filter(None, parts)))
            account.update(self.state.account_text())


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


_GOES = (
    GridColumn("rtt", right=True, spare=11, optional=True),
    GridColumn("resent", right=True, spare=10, optional=True),
    GridColumn("dropped", right=True, spare=9, optional=True),
    GridColumn("why", spare=12, optional=True),
)


def _goes(one: SocketGoing) -> tuple[Cell, ...]:
    """What stands in _GOES; nothing for 0."""
    counts = (one.resent, one.dropped)
    return (
        (duration(one.rtt_us / 1e6) if one.rtt_us else "", ""),
        *((f"{count:,}" if count else "", "yellow") for count in counts),
        (counted(one.reasons), "yellow"),
    )


class ProcessesView(View):
    columns = (
        GridColumn("pid", "pid", right=True),
        GridColumn("process", "name"),
        GridColumn("user", spare=5),
        GridColumn("rate", "rate", right=True),
        GridColumn("sent/s", "sent", right=True, spare=2),
        GridColumn("", "sent", spare=8),
        GridColumn("received/s", "received", right=True, spare=1),
        GridColumn("", "received", spare=8),
        GridColumn("total", "total", right=True, spare=3),
        GridColumn("flows", "flows", right=True, spare=6),
        GridColumn("runs in", spare=4),
        *_GOES,
        GridColumn("failed", "failed", right=True, spare=9, optional=True),
        GridColumn("resets", "resets", right=True, spare=10, optional=True),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Flows"),
        Binding("e", "ended", "Show or hide what has ended", show=False),
    ]

    def __init__(self, state: State, only: Callable[[ProcessRate], bool] | None = None) -> None:
        super().__init__(state)
        self._only = only
        """Which processes; None: all."""
        self._hidden = 0

    def leave(self) -> None:
        if self._only is not None:
            self.app.pop_screen()

    def action_ended(self) -> None:
        self.state.shows_ended = not self.state.shows_ended
        self.show()

    def more_text(self) -> str:
        return f"{self._hidden:,} ended (e)" if self._hidden else ""

    def title_text(self) -> str:
        processes, units = list(self._wanted()), self.state.units
        count = sum(process.pid is not None for process in processes)
        sent = amount(sum(process.meter.sent_rate for process in processes), units)
        received = amount(sum(process.meter.received_rate for process in processes), units)
        processes_text = _number(count, "process", "processes")
        return f"{processes_text}, {sent}/s sent, {received}/s received"

    def on_grid_selected(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        process = self.query_one(Grid).selected
        if process is not None:
            self.app.push_screen(FlowsView(self.state, process))

    def _wanted(self) -> Iterator[ProcessRate]:
        return filter(self._only, self.state.rates)

    def items(self) -> Sequence[ProcessRate]:
        wanted = list(self._wanted())
        shown = [one for one in wanted if not self.state.hides(one)]
        self._hidden = len(wanted) - len(shown)
        keys: dict[str, Callable[[ProcessRate], Any]] = {
            "pid": lambda one: one.key,
            "name": lambda one: one.comm.lower(),
            "sent": lambda one: (-one.meter.sent_rate, -one.meter.sent),
            "received": lambda one: (-one.meter.received_rate, -one.meter.received),
            "rate": lambda one: (-one.meter.rate, -one.meter.total),
            "total": lambda one: -one.meter.total,
            "flows": lambda one: -len(one.flows),
            "failed": lambda one: -one.failed,
            "resets": lambda one: -one.resets,
        }
        return sorted(shown, key=keys[self.sorting])

    def key(self, item: ProcessRate) -> Hashable:
        return item.key

    def _owner(self, process: ProcessRate) -> tuple[str, str, str, str]:
        """pid, name, user, unit or container."""
        user = "" if process.uid is None else plain(self.state.known.user(process.uid))
        where = plain(self.state.place(process))
        return str(process.pid or "-"), plain(process.comm), user, where

    def words(self, item: ProcessRate) -> str:
        return " ".join(self._owner(item))

    def cells(self, item: ProcessRate) -> Sequence[Cell]:
        units, meter = self.state.units, item.meter
        pid, name, user, place = self._owner(item)
        ended = self.state.ended(item)
        style = "dim" if ended else "yellow" if item.pid is None else "bold"
        return (
            (pid, style),
            (name + (" (ended)" if ended else ""), style),
            (user, ""),
            (amount(meter.rate, units), "bold"),
            (amount(meter.sent_rate, units), ""),
            (sparkline(item.sent_history, self.bars), "cyan"),
            (amount(meter.received_rate, units), ""),
            (sparkline(item.received_history, self.bars), "magenta"),
            (amount(meter.total, units), ""),
            (str(len(item.flows)), ""),
            (place, "blue"),
            *_goes(self.state.going(item.flows.values())),
            *((f"{count:,}" if count else "", "yellow") for count in (item.failed, item.resets)),
        )


_Flow = tuple[Hashable, FlowRate | int, TrafficMeter]
"""A flow, or how many flows there are to the far end that the key is."""


class FlowsView(View):
    """One process: its flows, or after Tab its far ends."""

    columns = (
        GridColumn("proto", spare=6),
        GridColumn("local", spare=5),
        GridColumn("far end", "far end"),
        GridColumn("sent/s", "sent", right=True, spare=3),
        GridColumn("received/s", "received", right=True, spare=2),
        GridColumn("rate", "rate", right=True),
        GridColumn("total", "total", right=True, spare=1),
        GridColumn("packets", "packets", right=True, spare=7),
        *_GOES,
        GridColumn("nat", spare=4, optional=True),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "remotes", "Flows or far ends", priority=True)
    ]

    def __init__(self, state: State, process: ProcessRate) -> None:
        super().__init__(state)
        self.process = process
        self.by_remote = False

    def title_text(self) -> str:
        process = self.process
        who = f"{plain(process.comm)}.{process.pid}" if process.pid else plain(process.comm)
        shown = _number(len(process.flows), "flow", "flows")
        if self.by_remote:
            shown = _number(self.query_one(Grid).row_count, "far end", "far ends")
        return f"{who}: {shown}"

    def more_text(self) -> str:
        process = self.process
        details = self.state.source.get(*process.key[:2]) if process.pid else None
        return plain(details.exe) if details is not None else ""

    def leave(self) -> None:
        self.app.pop_screen()

    def action_remotes(self) -> None:
        self.by_remote = not self.by_remote
        self.show()

    def items(self) -> Sequence[_Flow]:
        found: list[_Flow]
        if self.by_remote:
            counts = Counter((flow.netns, flow.remote) for flow in self.process.flows.values())
            ends = self.process.remotes()
            found = [(remote, counts[remote], meter) for remote, meter in ends.items()]
        else:
            found = [(key, flow, flow.meter) for key, flow in self.process.flows.items()]
        keys: dict[str, Callable[[_Flow], Any]] = {
            "far end": self._far,
            "sent": lambda one: (-one[2].sent_rate, -one[2].sent),
            "received": lambda one: (-one[2].received_rate, -one[2].received),
            "rate": lambda one: (-one[2].rate, -one[2].total),
            "total": lambda one: -one[2].total,
            "packets": lambda one: -one[2].packets,
        }
        found.sort(key=keys[self.sorting])
        return found

    def key(self, item: _Flow) -> Hashable:
        return item[0]

    def _far(self, item: _Flow) -> str:
        key, flow, _ = item
        if isinstance(flow, int):
            assert isinstance(key, tuple)
            place, remote = key
            domain = self._domain(place, remote)
            port = ""
        else:
            place, remote = flow.netns, flow.remote
            domain = self.state.source.ends.domain_of(flow.key)
            port = str(flow.rport) if self.state.numbers else service(flow.rport, flow.proto)
            port = f".{port}"
        other = self.state.namespaces.name(place)
        where = f" netns {plain(other)}" if other else ""
        return f"{plain(domain or self.state.host(remote))}{port}{where}"

    def _domain(self, netns: int, remote: str) -> str:
        """Return the far end's name, if all its flows that have one agree."""
        ends, flows = self.state.source.ends, self.process.flows.values()
        found = {
            domain
            for flow in flows
            if (flow.netns, flow.remote) == (netns, remote) and (domain := ends.domain_of(flow.key))
        }
        return found.pop() if len(found) == 1 else ""

    def words(self, item: _Flow) -> str:
        made = self.cells(item)
        return " ".join(text for text, _ in (*made[:3], made[-1]))

    def cells(self, item: _Flow) -> Sequence[Cell]:
        _, flow, meter = item
        units = self.state.units
        if isinstance(flow, int):
            proto, near = "", _number(flow, "flow", "flows")
            became, goes = "", SocketGoing()
        else:
            proto, near = flow.proto, f"{flow.local}.{flow.lport}"
            became, goes = nat(*flow.translated()), self.state.going([flow])
        return (
            (proto, ""),
            (near, ""),
            (self._far(item), "bold"),
            (amount(meter.sent_rate, units), ""),
            (amount(meter.received_rate, units), ""),
            (amount(meter.rate, units), "bold"),
            (amount(meter.total, units), ""),
            (f"{meter.packets:,}", ""),
            *_goes(goes),
            (became, "cyan"),
        )
