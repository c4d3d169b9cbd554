# SPDX-License-Identifier: MIT
"""Makes names that anybody may have chosen harmless for the place where they are shown.

A process can have any name, even with escape sequences and line breaks.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["cell", "escaped", "plain", "sound", "uncell", "unescaped"]

# Cc control, Cf format (bidi overrides, zero width), Cs surrogate, Co private, Cn unassigned.
# Zl and Zp are line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

# Characters that make a spreadsheet compute, also in the wide letters of some keyboards.
_SIGN = r"[=+\-@\uff1d\uff0b\uff0d\uff20]"
_FORMULA = re.compile(rf"'*\s*{_SIGN}")
# where a comma does not separate, a semicolon does, and what follows it is a cell
_INNER = re.compile(rf";(?=[\"']*\s*{_SIGN})")
_ESCAPE = re.compile(r"\\(?:x([0-7][0-9a-f])|u([0-9a-f]{4})|u\{([0-9a-f]{5,6})\})")


def _shown(character: str) -> str:
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
    """Return `name` on one line, all of it visible; a terminal's control characters as \\xNN."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(map(_shown, name))


@lru_cache(65536)
def sound(text: str) -> str:
    """Return `text`, halves of surrogate pairs as \\uNNNN: no UTF-8 can hold them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _kept(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\u{{{code:x}}}"


@lru_cache(65536)
def escaped(name: str) -> str:
    """Return `name` as plain() does, but so that unescaped() returns exactly `name`.

    \\x80 to \\xff are left as they are: wire.text() writes bytes that are no UTF-8 so.
    """
    if "\\" in name:
        name = _ESCAPE.sub(lambda found: "\\x5c" + found[0][1:], name)
    if name.isascii() and name.isprintable():
        return name
    return "".join(map(_kept, name))


@lru_cache(65536)
def unescaped(text: str) -> str:
    """Return the name from which escaped() made `text`."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(_character, text)


def _character(found: re.Match[str]) -> str:
    code = int(found[1] or found[2] or found[3], 16)
    return chr(code) if code < 0x110000 else found[0]


@lru_cache(65536)
def cell(name: str) -> str:
    """Return `name` for a table that a spreadsheet may open: escaped, and never a formula.

    A ' before it marks a name that a spreadsheet would compute, as "=cmd()". uncell() removes it.
    """
    shown = _INNER.sub(r"\\x3b", escaped(name))
    return f"'{shown}" if _FORMULA.match(shown) else shown


@lru_cache(65536)
def uncell(text: str) -> str:
    """Return the name from which cell() made `text`."""
    if text.startswith("'") and _FORMULA.match(text, 1):
        text = text[1:]
    return unescaped(text)
