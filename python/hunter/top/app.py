# SPDX-License-Identifier: MIT
"""hunter top: processes by rate, live, down to their flows and far ends (Textual)."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from hunter.cli.arguments import filter_of
from hunter.cli.signals import Stop
from hunter.show.account import ShownAccount
from hunter.show.names import Names, service
from hunter.show.rates import KEPT_S, UNITS, FlowRate, Meter, ProcessRate, Rates, amount
from hunter.show.text import plain
from hunter.sources.source import Source, open_source
from hunter.top.grid import Cell, Column, Grid
from nlproto import Error
from nlproto.pipeline.pipeline import NamedBatch

__all__ = ["Top", "run"]

_BARS = " ▁▂▃▄▅▆▇█"


def sparkline(history: Iterable[float]) -> str:
    """Return one bar a value, the highest at full height."""
    values = list(history)
    most = max(values, default=0.0)
    if not most:
        return _BARS[0] * len(values)
    return "".join(_BARS[-int(-value * 8 // most)] for value in values)


def run(options: argparse.Namespace, stop: Stop, notify: Callable[[str], None]) -> None:
    """Show until the user quits or a signal comes. Raises Error."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # it reads the one and draws on the other
        raise Error("top needs a terminal; without one: packet-hunter --summary --duration 10s")
    # without its terminal there is nothing left to do, and Textual would wait for it for ever
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wanted = filter_of(options)
    notes: list[str] = []
    with open_source(options, wanted, notes.append) as source, Names() as known:
        # what a file says stays, however long ago it was read
        kept_s = math.inf if options.read else KEPT_S
        app = Top(source, known, options.units, options.interval, str(wanted), notes, kept_s)
        app.numbers = options.numbers
        app.asked_to_end = stop
        app.run()
        rest = source.finish()
    for batch in rest:
        app.shown.add(batch)
    if app.failure is not None:
        raise app.failure
    for line in app.shown.lines(source.account(), source.lost()):
        notify(line)


class _Inbox:
    """What a thread of its own reads from the source, until the next tick."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._batches: list[NamedBatch] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self.failure: Error | None = None
        self.ended = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def take(self) -> list[NamedBatch]:
        with self._lock:
            batches, self._batches = self._batches, []
        return batches

    def _read(self) -> None:
        while not self._stopping.is_set():
            try:
                batches = self._source.read(0.1)
            except Error as error:
                self.failure = error
                return
            if batches is None:
                self.ended = True
                return
            with self._lock:
                self._batches += batches


class _View(Screen[None]):
    """A table that is filled anew at each tick."""

    columns: ClassVar[Sequence[Column]] = ()
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "find", "Find"),
        Binding("less_than_sign", "sort(-1)", "Sort", key_display="< >"),
        Binding("greater_than_sign", "sort(1)", show=False),
        Binding("s", "sort_by('sent')", "Sent"),
        Binding("r", "sort_by('received')", "Received"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.sorting = "rate"
        self.needle = ""
        self._ready = False

    @property
    def top(self) -> Top:
        assert isinstance(self.app, Top)
        return self.app

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
        """Escape without a search: nothing in the first view."""

    def action_sort(self, step: int) -> None:
        names = list(dict.fromkeys(column.sort for column in self.columns if column.sort))
        self.action_sort_by(names[(names.index(self.sorting) + step) % len(names)])

    def action_sort_by(self, name: str) -> None:
        self.sorting = name
        self.show()

    def items(self) -> Sequence[Any]:
        """Return what there is, in order."""
        raise NotImplementedError

    def key(self, item: Any) -> Hashable:
        raise NotImplementedError

    def cells(self, item: Any) -> Sequence[Cell]:
        raise NotImplementedError

    def words(self, item: Any) -> str:
        """Return the text that a search looks at."""
        raise NotImplementedError

    def title_text(self) -> str:
        raise NotImplementedError

    def more_text(self) -> str:
        """Return what may be cut off at the end of the title."""
        return ""

    def show(self) -> None:
        """Fill the table; a tick before it is there, or while the program ends, does nothing."""
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
            parts = (told, "PAUSED" if self.top.paused else "", self.more_text())
            title.update("  ".join(filter(None, parts)))
            account.update(self.top.account_text())


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


class ProcessesView(_View):
    columns = (
        Column("pid", "pid", right=True),
        Column("process", "name"),
        Column("user"),
        Column("rate", "rate", right=True),
        Column("sent/s", "sent", right=True),
        Column("", "sent"),
        Column("received/s", "received", right=True),
        Column("", "received"),
        Column("total", "total", right=True),
        Column("flows", "flows", right=True),
        Column("runs in"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", "Flows")]

    def title_text(self) -> str:
        processes, units = list(self.top.rates), self.top.units
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
            self.app.push_screen(FlowsView(process))

    def items(self) -> Sequence[ProcessRate]:
        keys: dict[str, Callable[[ProcessRate], Any]] = {
            "pid": lambda one: one.key,
            "name": lambda one: one.comm.lower(),
            "sent": lambda one: (-one.meter.sent_rate, -one.meter.sent),
            "received": lambda one: (-one.meter.received_rate, -one.meter.received),
            "rate": lambda one: (-one.meter.rate, -one.meter.total),
            "total": lambda one: -one.meter.total,
            "flows": lambda one: -len(one.flows),
        }
        return sorted(self.top.rates, key=keys[self.sorting])

    def key(self, item: ProcessRate) -> Hashable:
        return item.key

    def _owner(self, process: ProcessRate) -> tuple[str, str, str, str]:
        """pid, name, user, unit or container."""
        details = self.top.source.get(*process.key[:2]) if process.pid else None
        place = plain(details.container or details.unit) if details else ""
        user = "" if process.uid is None else plain(self.top.known.user(process.uid))
        return str(process.pid or "-"), plain(process.comm), user, place

    def words(self, item: ProcessRate) -> str:
        return " ".join(self._owner(item))

    def cells(self, item: ProcessRate) -> Sequence[Cell]:
        units, meter = self.top.units, item.meter
        pid, name, user, place = self._owner(item)
        ended = self.top.ended(item)
        style = "dim" if ended else "yellow" if item.pid is None else "bold"
        return (
            (pid, style),
            (name + (" (ended)" if ended else ""), style),
            (user, ""),
            (amount(meter.rate, units), "bold"),
            (amount(meter.sent_rate, units), ""),
            (sparkline(item.sent_history), "cyan"),
            (amount(meter.received_rate, units), ""),
            (sparkline(item.received_history), "magenta"),
            (amount(meter.total, units), ""),
            (str(len(item.flows)), ""),
            (place, "blue"),
        )


_Flow = tuple[Hashable, FlowRate | int, Meter]
"""A flow, or how many flows there are to the far end that the key is."""


class FlowsView(_View):
    """One process: its flows, or after Tab its far ends."""

    columns = (
        Column("proto"),
        Column("local"),
        Column("far end", "far end"),
        Column("sent/s", "sent", right=True),
        Column("received/s", "received", right=True),
        Column("rate", "rate", right=True),
        Column("total", "total", right=True),
        Column("packets", "packets", right=True),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "remotes", "Flows or far ends", priority=True)
    ]

    def __init__(self, process: ProcessRate) -> None:
        super().__init__()
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
        details = self.top.source.get(*process.key[:2]) if process.pid else None
        return plain(details.exe) if details is not None else ""

    def leave(self) -> None:
        self.app.pop_screen()

    def action_remotes(self) -> None:
        self.by_remote = not self.by_remote
        self.show()

    def items(self) -> Sequence[_Flow]:
        found: list[_Flow]
        if self.by_remote:
            counts = Counter(flow.remote for flow in self.process.flows.values())
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
            return plain(self.top.host(str(key)))
        port = str(flow.rport) if self.top.numbers else service(flow.rport, flow.proto)
        return f"{plain(self.top.host(flow.remote))}.{port}"

    def words(self, item: _Flow) -> str:
        return " ".join(text for text, _ in self.cells(item)[:3])

    def cells(self, item: _Flow) -> Sequence[Cell]:
        _, flow, meter = item
        units = self.top.units
        if isinstance(flow, int):
            proto, near = "", _number(flow, "flow", "flows")
        else:
            proto, near = flow.proto, f"{flow.local}.{flow.lport}"
        return (
            (proto, ""),
            (near, ""),
            (self._far(item), "bold"),
            (amount(meter.sent_rate, units), ""),
            (amount(meter.received_rate, units), ""),
            (amount(meter.rate, units), "bold"),
            (amount(meter.total, units), ""),
            (f"{meter.packets:,}", ""),
        )


class Top(App[None]):
    """The program; the source is read by a thread, everything else happens at ticks."""

    TITLE = "packet-hunter top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { background: $primary-darken-2; color: $text; padding: 0 1; height: 1; }
    #account { background: $surface; color: $text-muted; padding: 0 1; }
    Input, Input:focus { height: 1; border: none; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "pause", "Pause"),
        Binding("u,m", "units", "Units"),
        Binding("n", "names", "Names"),
        Binding("escape", "screen.back", "Back"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        source: Source,
        known: Names,
        units: str = UNITS[0],
        interval: float = 1.0,
        filter_text: str = "",
        notes: Sequence[str] = (),
        kept_s: float = KEPT_S,
    ) -> None:
        super().__init__()
        self.source = source
        self.known = known
        self.numbers = False
        """Hosts and services as numbers."""
        self.units = units
        self.interval = interval
        self.filter_text = filter_text
        self.notes = notes
        self.asked_to_end: Stop | bool = False
        """True once a signal did."""
        self.rates = Rates(kept_s)
        self.shown = ShownAccount()
        self.paused = False
        self.failure: Error | None = None
        self._inbox = _Inbox(source)
        self._last_s = time.monotonic()

    def on_mount(self) -> None:
        self.push_screen(ProcessesView())
        for note in self.notes:
            self.notify(plain(note), severity="warning", timeout=10, markup=False)
        self._inbox.start()
        self.set_interval(self.interval, self.tick)
        self.set_interval(0.2, self._heed)

    def on_unmount(self) -> None:
        self._inbox.stop()

    def _heed(self) -> None:
        if self.asked_to_end:
            self.exit()

    def tick(self) -> None:
        """Take what came, and show it unless paused."""
        now_s = time.monotonic()
        batches = self._inbox.take()
        for batch in batches:
            self.shown.add(batch)
        self.rates.tick(batches, now_s, max(now_s - self._last_s, 1e-3))
        self._last_s = now_s
        if self._inbox.failure is not None:
            self.failure = self._inbox.failure
            self.exit()
        elif not self.paused:
            self._show()

    def _show(self) -> None:
        """Show the view on top; there is none while the program ends."""
        stack = self.screen_stack
        if stack and isinstance(stack[-1], _View):
            stack[-1].show()

    def ended(self, process: ProcessRate) -> bool:
        """Whether the process is known to have exited; its row stays a minute."""
        if process.pid is None:
            return False
        details = self.source.get(*process.key[:2])
        if details is not None and details.exit_ns is not None:
            return True
        return not os.path.exists(f"/proc/{process.pid}")

    def account_text(self) -> str:
        shown = self.shown
        share = f" ({100 * shown.named / shown.records:.1f} %)" if shown.records else ""
        text = f"{shown.records:,} packets, {shown.named:,} named{share}"
        account = self.source.account()
        lost = self.source.lost() + (sum(account["lost"].values()) if account else 0)
        text += f", {lost:,} lost ({self.source.description})"
        if self.filter_text:
            text += f" | {self.filter_text}"
        if self._inbox.ended:
            text += " | the source has ended"
        return plain(text)

    def host(self, address: str) -> str:
        return address if self.numbers else self.known.host(address)

    def action_names(self) -> None:
        self.numbers = not self.numbers
        self._show()

    def action_pause(self) -> None:
        self.paused = not self.paused
        self._show()

    def action_units(self) -> None:
        self.units = UNITS[(UNITS.index(self.units) + 1) % len(UNITS)]
        self._show()
