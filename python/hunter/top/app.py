# SPDX-License-Identifier: MIT
"""hunter top: processes by rate, live, down to their flows and far ends (Textual)."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from hunter.cli.choice import filter_of
from hunter.cli.options import TopOptions as TopOptions
from hunter.cli.signals import Stop
from hunter.show.names import HostNames, Namespaces
from hunter.show.rates import KEPT_S
from hunter.show.text import plain
from hunter.sources.opening import open_source
from hunter.top.going import Going
from hunter.top.groups import GroupsView, Help
from hunter.top.state import State
from hunter.top.views import ProcessesView, View
from nlproto import Error
from nlproto.host import netns

__all__ = ["Top", "run"]


def run(options: TopOptions, stop: Stop, notify: Callable[[str], None]) -> None:
    """Show until the user quits or a signal comes. Raises Error."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # it reads one and draws on the other
        raise Error("top needs a terminal; without one: packet-hunter --summary --duration 10s")
    # without a terminal nothing is left to do, and Textual would wait forever
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wanted = filter_of(options.choice)
    notes: list[str] = []
    with (
        open_source(options.origin, options.choice, wanted, notes.append) as source,
        HostNames() as known,
        nullcontext() if options.origin.read else Going() as going,
    ):
        # a file's processes stay, however old they are
        kept_s = math.inf if options.origin.read else KEPT_S
        state = State(source, known, options.units, str(wanted), kept_s, options.numbers, going)
        state.namespaces = Namespaces(None if options.origin.read else netns.own())
        app = Top(state, options.interval, notes)
        app.asked_to_end = stop
        app.run()
        rest = source.finish()
    for batch in rest:
        state.shown.add(batch)
    if state.failure is not None:
        raise state.failure
    for line in state.shown.lines(source.account(), source.lost()):
        notify(line)


class Top(App[None]):
    """The program. A thread reads the source; everything else happens at ticks."""

    TITLE = "packet-hunter top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title, #account { padding: 0 1; height: auto; max-height: 2; }
    #title { background: $primary-darken-2; color: $text; }
    #account { background: $surface; color: $text-muted; }
    Input, Input:focus { height: 1; border: none; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("b", "group", "Sum up"),
        Binding("space", "pause", "Pause", show=False),
        Binding("u,m", "units", "The next units", show=False),
        Binding("n", "names", "Hosts and services by name or number", show=False),
        Binding("escape", "screen.back", "Back", show=False),
        Binding("q", "quit", "Quit"),
        # newer Textual only says then which key it wants
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(self, state: State, interval: float = 1.0, notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.state = state
        self.interval = interval
        self.notes = notes
        self.asked_to_end: Stop | bool = False
        """Whether a signal ended it."""

    def on_mount(self) -> None:
        self.push_screen(ProcessesView(self.state))
        for note in self.notes:
            self.notify(plain(note), severity="warning", timeout=10, markup=False)
        self.state.start()
        self.set_interval(self.interval, self.tick)
        self.set_interval(0.2, self._heed)

    def on_unmount(self) -> None:
        self.state.stop()

    def _heed(self) -> None:
        if self.asked_to_end:
            self.exit()

    def tick(self) -> None:
        """Take what came, and show it unless it is paused."""
        self.state.take()
        if self.state.failure is not None:
            self.exit()
        elif not self.state.paused:
            self._show()

    def _show(self) -> None:
        """Refresh the top view. There is none while the program ends."""
        stack = self.screen_stack
        if stack and isinstance(stack[-1], View):
            stack[-1].show()

    def action_group(self) -> None:
        """Show processes in groups; GroupsView handles the key from there."""
        self.push_screen(GroupsView(self.state))

    def action_help(self) -> None:
        if isinstance(self.screen, View):
            self.push_screen(Help(_keys(self.screen)))

    def action_names(self) -> None:
        self.state.numbers = not self.state.numbers
        self._show()

    def action_pause(self) -> None:
        self.state.paused = not self.state.paused
        self._show()

    def action_units(self) -> None:
        self.state.next_units()
        self._show()


def _keys(view: View) -> list[tuple[str, str]]:
    """Return (keys, what they do) of a view, for people."""
    told: dict[str, list[str]] = {}
    for one in (*type(view).BINDINGS, *View.BINDINGS, *Top.BINDINGS):
        assert isinstance(one, Binding)
        keys = one.key_display or " ".join(_KEYS.get(key, key) for key in one.key.split(","))
        if one.description:
            told.setdefault(one.description, []).append(keys)
    return [(" ".join(keys), description) for description, keys in told.items()]


_KEYS = {"slash": "/", "greater_than_sign": ">"}
