# SPDX-License-Identifier: MIT
"""hunter top by name, unit, container or user; and its keys on one page."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from hunter.show.rates import HISTORY, ProcessRate, TrafficMeter
from hunter.show.text import plain
from hunter.show.units import amount
from hunter.top.grid import Cell, Grid, GridColumn
from hunter.top.state import GROUPS, State
from hunter.top.views import ProcessesView, View, sparkline

__all__ = ["GroupsView", "Help"]


@dataclass(slots=True)
class _Group:
    name: str
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    processes: int = 0
    flows: int = 0
    sent: list[float] = field(default_factory=lambda: [0.0] * HISTORY)
    received: list[float] = field(default_factory=lambda: [0.0] * HISTORY)

    def add(self, process: ProcessRate) -> None:
        """Ended processes count too: many short-lived ones may send most."""
        self.processes += process.pid is not None
        self.flows += len(process.flows)
        self.meter.sent += process.meter.sent
        self.meter.received += process.meter.received
        self.meter.sent_rate += process.meter.sent_rate
        self.meter.received_rate += process.meter.received_rate
        self.sent = list(map(add, self.sent, process.sent_history))
        self.received = list(map(add, self.received, process.received_history))


class GroupsView(View):
    """Sums of processes. `b` changes to the next kind of group, and after the last one back."""

    columns = (
        GridColumn("group", "name"),
        GridColumn("processes", "processes", right=True, spare=4),
        GridColumn("rate", "rate", right=True),
        GridColumn("sent/s", "sent", right=True, spare=2),
        GridColumn("", "sent", spare=6),
        GridColumn("received/s", "received", right=True, spare=1),
        GridColumn("", "received", spare=6),
        GridColumn("total", "total", right=True, spare=3),
        GridColumn("flows", "flows", right=True, spare=5),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Processes"),
        Binding("b", "next_group", "Sum up"),
    ]

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.by = GROUPS[0]

    def title_text(self) -> str:
        return f"by {self.by}: {self.query_one(Grid).row_count:,}"

    def leave(self) -> None:
        self.app.pop_screen()

    def action_next_group(self) -> None:
        at = GROUPS.index(self.by) + 1
        if at == len(GROUPS):
            self.app.pop_screen()
        else:
            self.by = GROUPS[at]
            self.show()

    def on_grid_selected(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        group, by, state = self.query_one(Grid).selected, self.by, self.state
        if group is not None:
            name = group.name
            self.app.push_screen(ProcessesView(state, lambda one: state.group(one, by) == name))

    def items(self) -> Sequence[_Group]:
        groups: dict[str, _Group] = {}
        for process in self.state.rates:
            name = self.state.group(process, self.by)
            groups.setdefault(name, _Group(name)).add(process)
        keys: dict[str, Callable[[_Group], Any]] = {
            "name": lambda one: one.name.lower(),
            "processes": lambda one: -one.processes,
            "rate": lambda one: (-one.meter.rate, -one.meter.total),
            "sent": lambda one: (-one.meter.sent_rate, -one.meter.sent),
            "received": lambda one: (-one.meter.received_rate, -one.meter.received),
            "total": lambda one: -one.meter.total,
            "flows": lambda one: -one.flows,
        }
        return sorted(groups.values(), key=keys[self.sorting])

    def key(self, item: _Group) -> Hashable:
        return item.name

    def words(self, item: _Group) -> str:
        return item.name

    def cells(self, item: _Group) -> Sequence[Cell]:
        units, meter = self.state.units, item.meter
        return (
            (plain(item.name) or "-", "bold" if item.name else "yellow"),
            (f"{item.processes:,}", ""),
            (amount(meter.rate, units), "bold"),
            (amount(meter.sent_rate, units), ""),
            (sparkline(item.sent, self.bars), "cyan"),
            (amount(meter.received_rate, units), ""),
            (sparkline(item.received, self.bars), "magenta"),
            (amount(meter.total, units), ""),
            (f"{item.flows:,}", ""),
        )


class Help(ModalScreen[None]):
    """All keys of the view below. Any key closes it."""

    DEFAULT_CSS = """
    Help { align: center middle; }
    Help VerticalScroll {
        width: auto; max-width: 100%; height: auto; max-height: 100%;
        background: $panel; padding: 1 2;
    }
    Help Static { width: auto; }
    """

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        width = max(len(key) for key, _ in self._keys)
        with VerticalScroll():
            yield Static(
                "\n".join(f"{key:>{width}}  {told}" for key, told in self._keys), markup=False
            )

    def on_key(self) -> None:
        self.dismiss()
