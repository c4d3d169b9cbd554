# SPDX-License-Identifier: MIT
"""Tables and colours for people on standard output."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

__all__ = ["Output", "TextRow", "has_blocks", "put"]

TextRow = list[str | Text]

_ASCII = Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)

_LEAST_WIDTH = 20


class Output(Console):
    """A rich console that reads no markup, and raises when a pipe is closed.

    Without UTF-8, or on a dumb terminal, it draws lines in ASCII. No line ends in blanks. Raises
    BrokenPipeError, where rich itself would end the program with 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)
        self._plain = os.environ.get("TERM") == "dumb"
        self.width = max(self.width, _LEAST_WIDTH)  # COLUMNS=0 would hide all words

    @property
    def encoding(self) -> str:
        """rich chooses ASCII boxes by it. Python says UTF-8 even in the C locale."""
        return "ascii" if self._plain or locale_is_ascii() else super().encoding

    def print(self, *objects: Any, **options: Any) -> None:
        """Print. Blanks at the ends of a table's lines are removed."""
        for one in objects:
            if isinstance(one, Table) and one.box is not None and self.encoding == "ascii":
                one.box = _ASCII
        trimmed = [_Trimmed(one) if isinstance(one, Table) else one for one in objects]
        super().print(*trimmed, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Trimmed:
    """Renders `inside` without blanks at the ends of lines."""

    def __init__(self, inside: RenderableType) -> None:
        self._inside = inside

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self._inside, options, pad=False):
            while line and not line[-1].text.strip() and not line[-1].control:
                line.pop()
            if line:
                last = line.pop()
                line.append(Segment(last.text.rstrip(), last.style))
            yield from line
            yield Segment.line()


def has_blocks() -> bool:
    """Return whether the terminal probably has the block characters for bars."""
    return os.environ.get("TERM") not in ("dumb", "linux") and not locale_is_ascii()


def locale_is_ascii() -> bool:
    """Return whether the user's locale is C or POSIX, whatever encoding Python uses in it."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        value = os.environ.get(name)
        if value:
            return value in ("C", "POSIX")
    return False


def put(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[TextRow],
    numbers: Collection[str] = (),
) -> None:
    """Print a table. If the terminal is too narrow, print a few lines for each row.

    A file or a pipe gets full width, because a cut line is no answer.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if wanted <= console.width:
        console.print(table)
    elif console.is_terminal:
        console.print(Text(title, style="italic"))
        for row in rows:
            _narrow(console, columns, row, numbers)
    else:
        console.width = wanted
        console.print(table)


def _narrow(
    console: Console, columns: Sequence[str], row: TextRow, numbers: Collection[str]
) -> None:
    console.print(row[0])
    words = []
    for name, cell in list(zip(columns, row, strict=True))[1:]:
        if str(cell):
            words.append(f"{cell} {name}" if name in numbers else f"{name} {cell}")
    indent = "  "
    for line in textwrap.wrap(
        ", ".join(words), max(console.width, 10), initial_indent=indent, subsequent_indent=indent
    ):
        console.print(Text(line))
