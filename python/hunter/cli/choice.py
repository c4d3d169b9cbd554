# SPDX-License-Identifier: MIT
"""Makes one filter of filter words, -F and the options of choice."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from hunter.cli import interfaces, values
from hunter.cli.options import FLEET_WORDS, SUBCOMMANDS, Choice, FleetOptions
from nlproto import Error
from nlproto.filters.filter import EVERYTHING, Filter
from nlproto.filters.mistakes import FilterError
from nlproto.filters.parse import parse
from nlproto.filters.words import MAX_LENGTH, NAME_WORDS, WORDS, quote

__all__ = ["filter_of", "fleet_filter"]


def _any(word: str, values: Sequence[str] | None) -> str:
    return " or ".join(f"{word} {quote(value)}" for value in values or ())


def filter_of(choice: Choice, all_there: bool = True) -> Filter:
    """Return the filter of filter words, -F and options.

    `all_there`: the interfaces of -i must exist. Raises UsageError, FilterError.
    """
    texts = [_joined(choice.filter)]
    if choice.filter_file:
        try:
            with open(choice.filter_file, encoding="utf-8") as file:
                lines = file.read(MAX_LENGTH + 1).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise Error(f"cannot read the filter in {choice.filter_file}: {reason}") from None
        texts.append(" ".join(line for line in lines if not line.lstrip().startswith("#")))
    texts.append({"in": "inbound", "out": "outbound"}.get(choice.direction or "", ""))
    texts.append(interfaces.filter_text(choice.interface, all_there))
    for word in ("pid", "uid", "netns", *NAME_WORDS):
        texts.append(_any(word, getattr(choice, word)))
    result = EVERYTHING
    for text in texts:
        try:
            result = result & parse(text)
        except FilterError as error:
            raise _meant_command(error) or error from None
    return result


def fleet_filter(options: FleetOptions) -> Filter:
    """Return the filter of a question to the fleet. Raises FilterError."""
    given = {word: getattr(options, word) for word in FLEET_WORDS}
    texts = [_with_port(_joined(options.filter)), options.proto or ""]
    texts += [_any(word, [str(one)]) for word, one in given.items() if one is not None]
    result = EVERYTHING
    for text in texts:
        result = result & parse(text, elsewhere=True)
    return result


def _with_port(text: str) -> str:
    """Return the filter; what begins with a port, as `who 443`, is about that port."""
    first = text.split(maxsplit=1)[:1]
    return f"port {text}" if first and first[0] not in WORDS and _is_port(first[0]) else text


def _is_port(word: str) -> bool:
    try:
        values.port(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def _meant_command(error: FilterError) -> FilterError | None:
    """Return what to say if the first word is nearly a subcommand, else None."""
    word = error.text[: error.end]
    if error.start != 0 or word in WORDS:
        return None
    meant = [f"--{word}"] if word in ("help", "version") else []
    meant = meant or difflib.get_close_matches(word, SUBCOMMANDS, 1, 0.6)
    if not meant:
        return None
    _, _, other = str(error).partition("did you mean '")
    if other and _likeness(word, other.partition("'")[0]) > _likeness(word, meant[0]):
        return None
    return FilterError(
        f"unknown word {word!r}; did you mean '{meant[0]}'?", error.text, 0, error.end
    )


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _joined(words: Sequence[str]) -> str:
    """Return the filter as one text. A name that the shell unquoted is quoted again."""
    texts = []
    for index, word in enumerate(words):
        named = index and words[index - 1] in NAME_WORDS
        texts.append(quote(word) if named and not word.startswith('"') else word)
    return " ".join(texts)
