# SPDX-License-Identifier: MIT
"""A table for Textual with any number of rows. It makes and draws only visible rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

__all__ = ["Cell", "GridColumn", "Grid"]

Cell = tuple[str, str]
"""A text and its style in rich's words: ("curl", "bold")."""


@dataclass(frozen=True, slots=True)
class GridColumn:
    """`sort` is the name by which to sort; "" cannot be sorted by.

    A terminal that is too narrow does without columns that have a `spare`, the highest first. One
    that is `optional` takes no room until a row that was seen has something in it.
    """

    name: str
    sort: str = ""
    right: bool = False
    spare: int = 0
    optional: bool = False


class Grid(ScrollView, can_focus=True):
    """Once moved, the cursor stays on its row, wherever that goes. Columns only grow."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--header", "table--odd", "table--cursor"}
    DEFAULT_CSS = """
    Grid {
        height: 1fr; background: $surface; color: $foreground; scrollbar-size: 1 1;
        scrollbar-background: $surface; scrollbar-color: $panel;
        scrollbar-background-hover: $surface; scrollbar-background-active: $surface;
    }
    Grid > .table--header { background: $panel; color: $foreground; text-style: bold; }
    Grid > .table--odd { background: $boost; }
    Grid > .table--cursor { background: $primary 40%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "move(-1000000)", show=False),
        Binding("end,G", "move(1000000)", show=False),
    ]

    class Selected(Message):
        """A click on the row of the cursor."""

    class HeaderClicked(Message):
        """`column` is the index of the column."""

        def __init__(self, column: int) -> None:
            super().__init__()
            self.column = column

    def __init__(self, columns: Sequence[GridColumn]) -> None:
        super().__init__()
        self._columns = columns
        self._widths = [0 if one.optional else cell_len(one.name) for one in columns]
        self._shown = list(range(len(columns)))
        """The columns for which there is room."""
        self._items: Sequence[Any] = ()
        self._key: Callable[[Any], Hashable] = id
        self._cells: Callable[[Any], Sequence[Cell]] = list
        self._seen: dict[int, Sequence[Cell]] = {}
        self._styles: dict[tuple[str, str], Style] = {}
        self.cursor = 0
        self._chosen: Hashable = None

    @property
    def row_count(self) -> int:
        return len(self._items)

    @property
    def selected(self) -> Any:
        """The item of the cursor; None in an empty table."""
        return self._items[self.cursor] if self._items else None

    def texts(self, row: int) -> list[str]:
        """Return the texts of a row's cells."""
        return [text for text, _ in self._cells(self._items[row])]

    def fill(
        self,
        items: Sequence[Any],
        key: Callable[[Any], Hashable],
        cells: Callable[[Any], Sequence[Cell]],
    ) -> None:
        """Show `items`. `key` identifies an item from one call to the next."""
        before, place = self._seen, self._place(self._items)
        self._items, self._key, self._cells = items, key, cells
        if self._chosen is not None:
            found = (at for at, item in enumerate(items) if key(item) == self._chosen)
            self.cursor = next(found, self.cursor)
        self.cursor = max(0, min(self.cursor, len(items) - 1))
        self._seen = {}
        self._look()
        if place != self._place(items):
            self.refresh()
            return
        for row, made in self._seen.items():
            if made != before.get(row):
                self._refresh_row(row)

    def _place(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Return what must be equal for rows to keep their places on the screen."""
        return self.cursor, len(items), tuple(self._widths), tuple(self._shown)

    def _look(self) -> None:
        """Make the visible rows, and the room that they need."""
        first = max(0, round(self.scroll_y))
        for row in range(first, min(first + self.size.height, len(self._items))):
            if row not in self._seen:
                self._seen[row] = made = self._cells(self._items[row])
                for at, (text, _) in enumerate(made):
                    if text:
                        least = cell_len(self._columns[at].name)
                        self._widths[at] = max(self._widths[at], least, cell_len(text))
        self._shown = self._fitting()
        room = sum(self._widths[at] + 1 for at in self._shown)
        size = Size(room, len(self._items) + 1)
        if size != self.virtual_size:
            self.virtual_size = size

    def _fitting(self) -> list[int]:
        shown = [at for at, one in enumerate(self._columns) if self._widths[at] or not one.optional]
        while sum(self._widths[at] + 1 for at in shown) > self.size.width:
            spare = max(shown, key=lambda at: self._columns[at].spare)
            if not self._columns[spare].spare:
                break
            shown.remove(spare)
        return shown

    def _refresh_row(self, row: int) -> None:
        self.refresh(Region(0, row + 1 - round(self.scroll_y), self.size.width, 1))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        self._look()
        super().watch_scroll_y(old_value, new_value)

    def on_resize(self) -> None:
        self._look()

    def notify_style_update(self) -> None:
        self._styles.clear()
        super().notify_style_update()

    def render_line(self, y: int) -> Strip:
        row = y - 1 + round(self.scroll_y)
        if y == 0:
            kind, made = "header", [(column.name, "") for column in self._columns]
        elif row < len(self._items):
            kind = "cursor" if row == self.cursor else "odd" if row % 2 else ""
            made = list(self._seen.get(row) or self._cells(self._items[row]))
        else:
            return Strip.blank(self.size.width, self.rich_style)
        segments = []
        for at in self._shown:
            (text, style), width = made[at], self._widths[at]
            if self._columns[at].right:
                text = " " * (width - cell_len(text)) + text
            segments.append(Segment(f" {set_cell_size(text, width)}", self._style(kind, style)))
        left = round(self.scroll_x)
        return Strip(segments).crop_extend(left, left + self.size.width, self._style(kind, ""))

    def _style(self, kind: str, style: str) -> Style:
        found = self._styles.get((kind, style))
        if found is None:
            base = self.get_component_rich_style(f"table--{kind}") if kind else Style()
            found = self.rich_style + base + Style.parse(style)
            self._styles[kind, style] = found
        return found

    def action_move(self, rows: int) -> None:
        self._move_to(self.cursor + rows)

    def action_page(self, pages: int) -> None:
        self._move_to(self.cursor + pages * max(1, self.size.height - 2))

    def _move_to(self, row: int) -> None:
        if not self._items:
            return
        self._refresh_row(self.cursor)
        self.cursor = max(0, min(row, len(self._items) - 1))
        self._chosen = self._key(self._items[self.cursor]) if self.cursor else None
        self._refresh_row(self.cursor)
        top = round(self.scroll_y)
        lines = max(1, self.size.height - 1)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + lines:
            self.scroll_to(y=self.cursor - lines + 1, animate=False)

    def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            at = event.x + round(self.scroll_x)
            for number in self._shown:
                at -= self._widths[number] + 1
                if at < 0:
                    self.post_message(self.HeaderClicked(number))
                    return
            return
        row = event.y - 1 + round(self.scroll_y)
        if row >= len(self._items):
            return
        if row == self.cursor:
            self.post_message(self.Selected())
        else:
            self._move_to(row)
