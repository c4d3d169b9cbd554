# SPDX-License-Identifier: MIT
"""hunter top: processes by rate, live, down to their flows and far ends (Textual)."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static

from hunter import names
from hunter.account import Shown
from hunter.arguments import filter_of
from hunter.names import Names
from hunter.rates import UNITS, FlowRate, Meter, ProcessRate, Rates, amount
from hunter.source import Source, open_source
from hunter.text import plain
from nlproto import Error
from nlproto.pipeline import NamedBatch

__all__ = ["Top", "run"]

_ROWS = 100  # shown at most; nobody reads on
_Row = tuple[str, tuple[Text | str, ...], str]
_NUMBERS = {"pid", "sent/s", "received/s", "rate", "total", "flows", "packets"}
_BARS = " ▁▂▃▄▅▆▇█"


def sparkline(history: Iterable[float]) -> str:
    """Return one bar a value, the highest at full height."""
    values = list(history)
    most = max(values, default=0.0)
    if not most:
        return _BARS[0] * len(values)
    return "".join(_BARS[-int(-value * 8 // most)] for value in values)


def run(options: argparse.Namespace, notify: Callable[[str], None]) -> None:
    """Show until the user quits. Raises Error."""
    wanted = filter_of(options)
    notes: list[str] = []
    with open_source(options, wanted, notes.append) as source, Names() as hosts:
        host = str if options.numbers else hosts.host
        app = Top(source, host, options.units, options.interval, str(wanted), notes)
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
    """A table that is filled anew at each tick and keeps its cursor on the same row."""

    columns: ClassVar[Sequence[tuple[str, str]]] = ()
    """(name, what the key of sorting is called); "" cannot be sorted by."""

    def __init__(self) -> None:
        super().__init__()
        self.sorting = 0
        self.needle = ""
        self._ready = False

    @property
    def top(self) -> Top:
        assert isinstance(self.app, Top)
        return self.app

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield Input(placeholder="show rows with ...", id="needle")
        yield DataTable(cursor_type="row", zebra_stripes=True)
        yield Static(id="account", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(Input).display = False
        table = self.query_one(DataTable)
        for name, _ in self.columns:
            table.add_column(_right(name) if name in _NUMBERS else Text(name), key=name)
        table.focus()
        self._ready = True
        self.show()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.needle = event.value.lower()
        self.show()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.query_one(DataTable).focus()

    def action_find(self) -> None:
        box = self.query_one(Input)
        box.display = True
        box.focus()

    def action_back(self) -> None:
        box = self.query_one(Input)
        if box.display:
            box.value = ""
            box.display = False
            self.query_one(DataTable).focus()
        else:
            self.leave()

    def leave(self) -> None:
        """Escape without a search: nothing in the first view."""

    def action_sort(self) -> None:
        while True:
            self.sorting = (self.sorting + 1) % len(self.columns)
            if self.columns[self.sorting][1]:
                break
        self.show()

    def rows(self) -> Iterator[_Row]:
        """Return (key, cells, text to search) in order; made only as far as they are read."""
        raise NotImplementedError

    def total(self) -> int:
        """How many rows() gives."""
        raise NotImplementedError

    def title_text(self) -> str:
        raise NotImplementedError

    def show(self) -> None:
        """Fill the table; a tick before it is there, or while the program ends, does nothing."""
        if not self._ready or not self.query(DataTable):
            return
        table = self.query_one(DataTable)
        before = None
        if table.row_count:
            before = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        if self.needle:
            found = [row for row in self.rows() if self.needle in row[2].lower()]
            rows, total = found[:_ROWS], len(found)
        else:
            rows, total = list(islice(self.rows(), _ROWS)), self.total()
        scroll = table.scroll_offset
        with self.app.batch_update():
            table.clear()
            for key, cells, _ in rows:
                table.add_row(*cells, key=key)
            keys = [row[0] for row in rows]
            if before in keys:
                table.move_cursor(row=keys.index(before), scroll=False)
            table.scroll_to(scroll.x, scroll.y, animate=False)
            more = f", {total - _ROWS} more below" if total > _ROWS else ""
            sort = self.columns[self.sorting][1]
            self.query_one("#title", Static).update(
                f"{self.title_text()} by {sort}{more}{'  PAUSED' if self.top.paused else ''}"
            )
            self.query_one("#account", Static).update(self.top.account_text())


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _right(text: str, style: str = "") -> Text:
    return Text(text, style=style, justify="right")


class ProcessesView(_View):
    columns = (
        ("pid", "pid"),
        ("process", "name"),
        ("user", ""),
        ("sent/s", "sent"),
        ("", ""),
        ("received/s", "received"),
        (" ", ""),
        ("rate", "rate"),
        ("total", "total"),
        ("flows", "flows"),
        ("unit or container", ""),
    )

    def __init__(self) -> None:
        super().__init__()
        self.sorting = 7

    def title_text(self) -> str:
        count = sum(process.pid is not None for process in self.top.rates)
        where = self.top.source.description
        return f"{_number(count, 'process', 'processes')} ({where}); Enter shows flows; sorted"

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        for process in self.top.rates:
            if str(process.key) == event.row_key.value:
                self.app.push_screen(FlowsView(process))

    def total(self) -> int:
        return len(self.top.rates.processes)

    def rows(self) -> Iterator[_Row]:
        keys: dict[str, Callable[[ProcessRate], object]] = {
            "pid": lambda one: one.key,
            "name": lambda one: one.comm.lower(),
            "sent": lambda one: -one.meter.sent_rate,
            "received": lambda one: -one.meter.received_rate,
            "rate": lambda one: (-one.meter.rate, -one.meter.total),
            "total": lambda one: -one.meter.total,
            "flows": lambda one: -len(one.flows),
        }
        key = keys[self.columns[self.sorting][1]]
        ordered = sorted(self.top.rates, key=key)  # type: ignore[arg-type]
        return map(self._row, ordered)

    def _row(self, process: ProcessRate) -> _Row:
        units, meter = self.top.units, process.meter
        details = self.top.source.get(*process.key[:2]) if process.pid else None
        place = plain(details.container[:12] or details.unit) if details else ""
        user = "" if process.uid is None else plain(names.user(process.uid))
        ended = self.top.ended(process)
        style = "dim" if ended else "yellow" if process.pid is None else "bold"
        name = plain(process.comm) + (" (ended)" if ended else "")
        pid = str(process.pid or "-")
        cells = (
            _right(pid, style),
            Text(name, style=style),
            Text(user),
            _right(amount(meter.sent_rate, units)),
            Text(sparkline(process.sent_history), style="cyan"),
            _right(amount(meter.received_rate, units)),
            Text(sparkline(process.received_history), style="magenta"),
            _right(amount(meter.rate, units), "bold"),
            _right(amount(meter.total, units)),
            _right(str(len(process.flows))),
            Text(place, style="blue"),
        )
        return str(process.key), cells, f"{pid} {name} {user} {place}"


class FlowsView(_View):
    """One process: its flows, or with "r" its far ends."""

    columns = (
        ("proto", ""),
        ("local", ""),
        ("far end", "far end"),
        ("sent/s", "sent"),
        ("received/s", "received"),
        ("rate", "rate"),
        ("total", "total"),
        ("packets", "packets"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [Binding("r", "remotes", "Flows or far ends")]

    def __init__(self, process: ProcessRate) -> None:
        super().__init__()
        self.sorting = 5
        self.process = process
        self.by_remote = False

    def title_text(self) -> str:
        process = self.process
        who = f"{plain(process.comm)}.{process.pid}" if process.pid else plain(process.comm)
        details = self.top.source.get(*process.key[:2]) if process.pid else None
        exe = f" {plain(details.exe)}" if details is not None and details.exe else ""
        shown = _number(len(process.flows), "flow", "flows")
        if self.by_remote:
            shown = _number(len(process.remotes()), "far end", "far ends")
        return f"{who}{exe}: {shown},"

    def leave(self) -> None:
        self.app.pop_screen()

    def action_remotes(self) -> None:
        self.by_remote = not self.by_remote
        self.show()

    def total(self) -> int:
        flows = self.process.flows
        return len({flow.remote for flow in flows.values()}) if self.by_remote else len(flows)

    def rows(self) -> Iterator[_Row]:
        found: list[tuple[str, FlowRate | None, Meter]]
        if self.by_remote:
            found = [(remote, None, meter) for remote, meter in self.process.remotes().items()]
        else:
            found = [(str(key), flow, flow.meter) for key, flow in self.process.flows.items()]
        keys: dict[str, Callable[[tuple[str, FlowRate | None, Meter]], object]] = {
            "far end": lambda one: self._far(one[0], one[1]),
            "sent": lambda one: -one[2].sent_rate,
            "received": lambda one: -one[2].received_rate,
            "rate": lambda one: (-one[2].rate, -one[2].total),
            "total": lambda one: -one[2].total,
            "packets": lambda one: -one[2].packets,
        }
        found.sort(key=keys[self.columns[self.sorting][1]])  # type: ignore[arg-type]
        return map(self._row, found)

    def _far(self, key: str, flow: FlowRate | None) -> str:
        if flow is None:
            return plain(self.top.host(key))
        return f"{plain(self.top.host(flow.remote))}.{names.service(flow.rport, flow.proto)}"

    def _row(self, one: tuple[str, FlowRate | None, Meter]) -> _Row:
        key, flow, meter = one
        units, far = self.top.units, self._far(key, flow)
        proto = flow.proto if flow else ""
        near = f"{flow.local}.{flow.lport}" if flow else ""
        cells = (
            proto,
            near,
            Text(far, style="bold"),
            _right(amount(meter.sent_rate, units)),
            _right(amount(meter.received_rate, units)),
            _right(amount(meter.rate, units), "bold"),
            _right(amount(meter.total, units)),
            _right(f"{meter.packets:,}"),
        )
        return key, cells, f"{proto} {near} {far}"


class Top(App[None]):
    """The program; the source is read by a thread, everything else happens at ticks."""

    TITLE = "packet-hunter top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    DataTable { height: 1fr; }
    #title { background: $primary-darken-2; color: $text; padding: 0 1; }
    #account { background: $surface; color: $text-muted; padding: 0 1; }
    Input { height: 3; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "screen.find", "Find"),
        Binding("s", "screen.sort", "Sort"),
        Binding("space", "pause", "Pause", priority=False),
        Binding("u", "units", "Units"),
        Binding("escape", "screen.back", "Back"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        source: Source,
        host: Callable[[str], str],
        units: str = UNITS[0],
        interval: float = 1.0,
        filter_text: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.source = source
        self.host = host
        self.units = units
        self.interval = interval
        self.filter_text = filter_text
        self.notes = notes
        self.rates = Rates()
        self.shown = Shown()
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

    def on_unmount(self) -> None:
        self._inbox.stop()

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
        text += f", {lost:,} lost"
        if self.filter_text:
            text += f" | {self.filter_text}"
        if self._inbox.ended:
            text += " | the source has ended"
        return plain(text)

    def action_pause(self) -> None:
        self.paused = not self.paused
        self._show()

    def action_units(self) -> None:
        self.units = UNITS[(UNITS.index(self.units) + 1) % len(UNITS)]
        self._show()
