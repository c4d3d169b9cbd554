# SPDX-License-Identifier: MIT
"""python -m hunter: signals, messages, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: nothing comes from there before it was looked at
    _first = sys.path.pop(0)
    sys.path.append(__file__.rpartition("/")[0].rpartition("/")[0])
    from nlproto.guard import refuse_unsafe_path

    sys.path.pop()
    sys.path.insert(0, _first)
    refuse_unsafe_path("packet-hunter")

import errno  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from hunter.cli import arguments, options  # noqa: E402
from hunter.cli.descriptors import open_standard  # noqa: E402
from hunter.cli.signals import Stop  # noqa: E402
from hunter.show.text import plain  # noqa: E402
from nlproto import Error, UsageError  # noqa: E402
from nlproto.filters.mistakes import FilterError  # noqa: E402
from nlproto.running import descriptors  # noqa: E402
from nlproto.running.foreign import foreign_packages  # noqa: E402
from nlproto.running.surroundings import missing  # noqa: E402

_OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _tell(line: str) -> None:
    """Write one line for people; a closed stderr is nobody's failure."""
    try:
        print(f"packet-hunter: {plain(line)}", file=sys.stderr, flush=True)
    except OSError:
        pass


class _Log(logging.Handler):
    """What the library says went wrong, as one line without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.getMessage())


def _forget_output() -> None:
    """Nobody takes it: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _run(command: options.Command, stop: Stop) -> int:
    """Return the exit code: that of the command after "--", else 0."""
    # Imported here: each subcommand needs parts that the others do without.
    match command:
        case options.Live():
            from hunter.commands import live

            return live.run(command, stop, _tell)
        case options.Who():
            from hunter.who import who

            who.run(command, _tell)
        case options.Usage():
            from hunter.commands import usage

            usage.run(command)
        case options.Watch():
            from hunter.watch import watch

            return watch.run(command, stop, _tell)
        case options.Fleet():
            from hunter.fleet import fleet

            return fleet.run(command, _tell)
        case options.Web():
            from hunter.web import web

            web.run(command, stop, _tell)
        case options.Stats():
            from hunter.commands import stats

            stats.run(command)
        case options.Top():
            try:
                from hunter.top import app
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] != "textual":
                    raise
                raise Error("top needs Textual: pip install 'packet-hunter[top]'") from None

            app.run(command, stop, _tell)
        case options.Doctor():
            from hunter.commands import doctor

            doctor.run(command)
        case options.Annotate():
            from hunter.commands import annotate

            annotate.run(command, stop, _tell)
        case options.Report():
            from hunter.commands import report

            report.run(command, _tell)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv).

    Returns 0, 1 (failure), 2 (usage), or the exit code of the command after "--".
    """
    open_standard()
    logging.getLogger().handlers = [_Log(logging.WARNING)]
    for line in foreign_packages():
        _tell(line)
    code = 0
    try:
        try:
            descriptors.raise_limit()
            with Stop() as stop:
                code = _run(arguments.parse(sys.argv[1:] if argv is None else argv), stop)
        except SystemExit as ended:  # --help, --version, doctor
            code = int(ended.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
    except KeyboardInterrupt:
        return 0
    except FilterError as error:
        _tell(str(error))
        for line in error.pointer().split("\n"):
            print(f"  {line}", file=sys.stderr)
        return 2
    except UsageError as error:
        _tell(str(error))
        return 2
    except Error as error:
        _tell(str(error))
        return 1
    except OSError as error:
        if lacking := missing(error):
            _tell(str(lacking))
            return 1
        if error.errno not in _OUTPUT_FAILS:
            raise
        _forget_output()
        _tell(f"cannot write to standard output: {error.strerror}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
