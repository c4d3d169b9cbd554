# SPDX-License-Identifier: MIT
"""python -m hunter: signals, messages, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: import nothing from there before it is checked
    _current = sys.path.pop(0)
    sys.path.append(__file__.rsplit("/", 2)[0])
    from nlproto.guard import leave_current_directory

    leave_current_directory("packet-hunter", _current)

if __name__ == "__main__":
    from nlproto.running import interrupt

    interrupt.begins("packet-hunter")

import logging  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from hunter.cli import arguments, options  # noqa: E402
from hunter.cli.signals import Stop  # noqa: E402
from hunter.show.text import plain  # noqa: E402
from nlproto import Error  # noqa: E402
from nlproto.filters.mistakes import FilterError  # noqa: E402
from nlproto.running import descriptors  # noqa: E402
from nlproto.running.foreign import foreign_packages  # noqa: E402
from nlproto.running.program import ended, teller  # noqa: E402

_say = teller("packet-hunter")


def _tell(line: str) -> None:
    """Write one line for people."""
    _say(plain(line))


class _Log(logging.Handler):
    """Show a warning of a library as one line, without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.getMessage())


def _run(command: options.CommandOptions, stop: Stop) -> int:
    """Return the exit code: that of the command after "--", else 0."""
    # Imported here: each subcommand needs parts that the others do without.
    match command:
        case options.LiveOptions():
            from hunter.commands import live

            return live.run(command, stop, _tell)
        case options.WhoOptions():
            from hunter.who import who

            who.run(command, _tell)
        case options.UsageOptions():
            from hunter.commands import usage

            usage.run(command)
        case options.WatchOptions():
            from hunter.watch import watch

            return watch.run(command, stop, _tell)
        case options.FleetOptions():
            from hunter.fleet import fleet

            return fleet.run(command, _tell)
        case options.WebOptions():
            from hunter.web import web

            web.run(command, stop, _tell)
        case options.StatsOptions():
            from hunter.commands import stats

            stats.run(command)
        case options.TopOptions():
            try:
                from hunter.top import app
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] != "textual":
                    raise
                raise Error("top needs Textual: pip install 'packet-hunter[top]'") from None

            app.run(command, stop, _tell)
        case options.DoctorOptions():
            from hunter.commands import doctor

            doctor.run(command)
        case options.AnnotateOptions():
            from hunter.commands import annotate

            annotate.run(command, stop, _tell)
        case options.ReportOptions():
            from hunter.commands import report

            report.run(command, _tell)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv).

    Returns 0, 1 (failure), 2 (usage), or the exit code of the command after "--".
    """
    arguments_given = sys.argv[1:] if argv is None else argv

    def begin() -> int:
        logging.getLogger().handlers = [_Log(logging.WARNING)]
        for line in foreign_packages():
            _tell(line)
        descriptors.raise_limit()
        try:
            with Stop() as stop:
                return _run(arguments.parse(arguments_given), stop)
        except FilterError as error:
            _tell(str(error))
            for line in error.pointer().split("\n"):
                print(f"  {line}", file=sys.stderr)
            return error.exit_code

    return ended(begin, _tell, prints=True)


if __name__ == "__main__":
    sys.exit(main())
