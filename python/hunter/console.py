# SPDX-License-Identifier: MIT
"""Tables and colours for people on standard output."""

from __future__ import annotations

import os
from typing import Any

from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table

__all__ = ["Output"]

_ASCII = Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)


class Output(Console):
    """A rich console that takes no text for markup and lets a closed pipe be told.

    Without UTF-8, or on a dumb terminal, lines are drawn in ASCII; no line ends in blanks.
    Raises BrokenPipeError, where rich by itself would end the program with 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)
        self._plain = os.environ.get("TERM") == "dumb"

    @property
    def encoding(self) -> str:
        """What rich chooses ASCII boxes by; Python says UTF-8 in the C locale too."""
        return "ascii" if self._plain or _locale_is_ascii() else super().encoding

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a table loses the blanks that fill its lines."""
        for one in objects:
            if isinstance(one, Table) and one.box is not None and self.encoding == "ascii":
                one.box = _ASCII
        trimmed = [_Trimmed(one) if isinstance(one, Table) else one for one in objects]
        super().print(*trimmed, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Trimmed:
    """What `inside` renders, without blanks at the ends of lines."""

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


def _locale_is_ascii() -> bool:
    """Whether the user's locale is C or POSIX, whatever encoding Python takes in it."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        value = os.environ.get(name)
        if value:
            return value in ("C", "POSIX")
    return False
