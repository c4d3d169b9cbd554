# SPDX-License-Identifier: MIT
"""Tables and colours for people on standard output."""

from __future__ import annotations

from typing import Any

from rich.console import Console

__all__ = ["Output"]


class Output(Console):
    """A rich console that takes no text for markup and lets a closed pipe be told.

    Raises BrokenPipeError, where rich by itself would end the program with 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
