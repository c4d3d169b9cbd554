# SPDX-License-Identifier: MIT
"""How each program reads its command line, and how it ends: with one line and the right code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import IO, Any, NoReturn

from nlproto.errors import Error, UsageError
from nlproto.running import interrupt
from nlproto.running.standard import one_line, open_standard
from nlproto.running.surroundings import missing

__all__ = ["Parser", "ended", "teller"]

_OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class Parser(argparse.ArgumentParser):
    """A parser that says one line about a mistake, without the usage. Raises UsageError."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and remember the words for error()."""
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Always raise UsageError. argparse takes an unknown option's value for another mistake."""
        names = [word.partition("=")[0] for word in takewhile("--".__ne__, self._words)]
        unknown = [
            name for name in names if name.startswith("--") and not self._get_option_tuples(name)
        ]
        if unknown and "unrecognized" not in message:
            message = f"unrecognized arguments: {unknown[0]}"
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def add_version(self) -> None:
        """Add -V, --version."""
        self.add_argument("-V", "--version", action=_Version, help="print the version and exit")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """An empty word (an unset "$FILE") is a mistake, except as a filter, as in tcpdump."""
        if not arg_string and action.dest != "filter":
            raise argparse.ArgumentError(action, "an empty word means nothing")
        return super()._get_value(action, arg_string)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own version ignores a failed write."""
        _say(message, file or sys.stdout)


class _Version(argparse.Action):
    """As argparse's own, but looks up the version only when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, 0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import nlproto

        _say(f"{parser.prog} {nlproto.__version__}\n", sys.stdout)
        parser.exit()


def _say(text: str, file: IO[str]) -> None:
    try:
        file.write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget(1)
        raise Error(f"cannot write to standard output: {error.strerror}") from None


def _failed(error: OSError) -> Error | None:
    """Return what to say about `error` if the cause lies outside the program."""
    reason = error.strerror or str(error)
    if lacking := missing(error):
        return lacking
    if isinstance(error.filename, str):
        return Error(f"cannot use {error.filename}: {reason}")
    return None


def _forget(number: int) -> None:
    """Nobody reads 1 or 2 any more: Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def teller(program: str) -> Callable[[str], None]:
    """Return a function that writes a line for people to stderr; never mind if it cannot."""

    def tell(line: str) -> None:
        try:
            print(f"{program}: {one_line(line)}", file=sys.stderr, flush=True)
        except OSError:
            _forget(2)

    return tell


def ended(run: Callable[[], int], tell: Callable[[str], None], prints: bool = False) -> int:
    """Return what `run` returns, or the exit code of the exception that ended it.

    `tell` gets one line that says why. It is no failure if the reader of a pipe stops reading; it
    is one if output cannot be written. `prints`: a failed write in `run` without a file's name was
    to standard output.
    """
    open_standard()
    code = 0
    try:
        interrupt.raises()
        try:
            code = run()
        except SystemExit as asked:  # --help, --version, doctor
            code, prints = int(asked.code or 0), True
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(1)
    except KeyboardInterrupt:
        return 0
    except Error as error:
        tell(str(error))
        return error.exit_code
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        tell(f"{error}: raise the limit of tasks or memory (ulimit -u, -v, TasksMax=)")
        return 1
    except OSError as error:
        if known := _failed(error):
            tell(str(known))
            return known.exit_code
        if not prints or error.errno not in _OUTPUT_FAILS:
            raise
        _forget(1)
        tell(f"cannot write to standard output: {error.strerror}")
        return 1
    finally:
        interrupt.ends_quietly()
    return code
