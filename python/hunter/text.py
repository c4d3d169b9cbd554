# SPDX-License-Identifier: MIT
"""Names that anybody may have chosen, made harmless for where they are shown.

A process can call itself anything, escape sequences and line breaks included.
"""

import re
import unicodedata
from functools import lru_cache

__all__ = ["cell", "plain"]

# Cc control, Cf format (bidi overrides, zero width), Cs surrogate, Co private, Cn unassigned,
# Zl and Zp line and paragraph separators
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

_FORMULA = re.compile(r"[=@\t\r]|[+-].*[^\w.+-]", re.DOTALL)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8 (surrogateescape)
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\u{{{code:x}}}"


@lru_cache(65536)
def plain(name: str) -> str:
    """Return `name` on one line, all of it visible: what a terminal could act on as \\xNN."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(map(_escaped, name))


@lru_cache(65536)
def cell(name: str) -> str:
    """Return `name` for a table that a spreadsheet may open: plain, and never a formula.

    A leading ' marks a name that a spreadsheet would compute, as "=cmd()"; "-bash" stays.
    """
    shown = plain(name)
    return f"'{shown}" if _FORMULA.match(shown) else shown
