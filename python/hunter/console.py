# SPDX-License-Identifier: MIT
"""Tables and colours for people on standard output."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["Output", "Row", "put"]

Row = list[str | Text]


class Output(Console):
    """A rich console that takes no text for markup and lets a closed pipe be told.

    Raises BrokenPipeError, where rich by itself would end the program with 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def put(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    numbers: Collection[str] = (),
) -> None:
    """Print a table; where the terminal is too narrow for it, a few lines for each row.

    Into a file or a pipe it goes as wide as it is: a line that is cut off answers nothing.
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


def _narrow(console: Console, columns: Sequence[str], row: Row, numbers: Collection[str]) -> None:
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
