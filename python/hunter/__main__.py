# SPDX-License-Identifier: MIT
"""python -m hunter: signals, messages, exit codes."""

import errno
import os
import stat
import sys


def _loose(path: str) -> bool:
    """Whether others than root and the user behind sudo can write the directory `path`."""
    try:
        found = os.stat(path)
    except OSError:
        return True
    friends = {"0", str(os.geteuid()), os.environ.get("SUDO_UID", "0")}
    return bool(found.st_mode & (stat.S_IWOTH | stat.S_IWGRP)) or str(found.st_uid) not in friends


def refuse_unsafe_directory() -> None:
    """End with 1 when root would import modules from a directory that others can write."""
    if os.geteuid() != 0 or sys.flags.isolated or sys.flags.safe_path:
        return
    here = os.getcwd()
    if os.path.realpath(sys.path[0] or here) == os.path.realpath(here) and _loose(here):
        sys.exit(
            f"packet-hunter: others can write {here}, where Python looks for modules;"
            " change to another directory, or run packet-hunter"
        )


if __name__ == "__main__":
    refuse_unsafe_directory()

from collections.abc import Sequence  # noqa: E402

from hunter import arguments  # noqa: E402
from hunter.descriptors import open_standard  # noqa: E402
from hunter.signals import Stop  # noqa: E402
from hunter.text import plain  # noqa: E402
from nlproto import Error, UsageError  # noqa: E402
from nlproto.filter import FilterError  # noqa: E402
from nlproto.foreign import foreign_packages  # noqa: E402

_OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _tell(line: str) -> None:
    """Write one line for people; a closed stderr is nobody's failure."""
    try:
        print(f"packet-hunter: {plain(line)}", file=sys.stderr, flush=True)
    except OSError:
        pass


def _forget_output() -> None:
    """Nobody takes it: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _run(command: arguments.Command, stop: Stop) -> None:
    # Imported here: each subcommand needs parts that the others do without.
    if command.name == "live":
        from hunter import live

        live.run(command.options, command.argv, stop, _tell)
    elif command.name == "who":
        from hunter import who

        who.run(command.options, _tell)
    elif command.name == "stats":
        from hunter import stats

        stats.run(command.options)
    elif command.name == "top":
        try:
            from hunter import top
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "textual":
                raise
            raise Error("top needs Textual: pip install 'packet-hunter[top]'") from None

        top.run(command.options, stop, _tell)
    elif command.name == "doctor":
        from hunter import doctor

        doctor.run(command.options)
    elif command.name == "annotate":
        from hunter import annotate

        annotate.run(command.options, stop, _tell)
    else:
        from hunter import report

        report.run(command.options, _tell)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv); return 0, 1 (failure) or 2 (usage)."""
    open_standard()
    for line in foreign_packages():
        _tell(line)
    code = 0
    try:
        try:
            with Stop() as stop:
                _run(arguments.parse(sys.argv[1:] if argv is None else argv), stop)
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
        if error.errno not in _OUTPUT_FAILS:
            raise
        _forget_output()
        _tell(f"cannot write to standard output: {error.strerror}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
