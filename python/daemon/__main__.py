# SPDX-License-Identifier: MIT
"""python -m daemon: arguments, signals, exit codes."""

import os
import stat
import sys


def others_can_write(path: str, environment: dict[str, str]) -> bool:
    """Whether someone else than root and the user behind sudo could put a file into `path`.

    Nor may they replace a directory above it. Paths that are not there count as safe.
    """
    users = {0, *_number(environment.get("SUDO_UID"))}
    groups = {0, *_number(environment.get("SUDO_GID"))}
    here = path = os.path.realpath(path)
    while True:
        try:
            status = os.stat(path)
        except OSError:
            return False
        group_writes = status.st_mode & stat.S_IWGRP and status.st_gid not in groups
        loose = bool(status.st_mode & stat.S_IWOTH or group_writes)
        sticky = bool(status.st_mode & stat.S_ISVTX) and path != here
        if status.st_uid not in users or (loose and not sticky):
            return True
        if path == os.path.dirname(path):
            return False
        path = os.path.dirname(path)


def _number(text: str | None) -> list[int]:
    return [int(text)] if text is not None and text.isdigit() else []


def refuse_unsafe_directory() -> None:
    """End with 1 when root would import modules from a directory that others can write.

    Called before anything is imported that is not part of a bare interpreter.
    """
    if os.geteuid() != 0 or sys.flags.isolated or sys.flags.safe_path:
        return
    cwd = os.getcwd()
    searched = [os.path.realpath(entry or cwd) for entry in sys.path]
    if os.path.realpath(cwd) in searched and others_can_write(cwd, dict(os.environ)):
        sys.exit(
            f"packet-hunterd: others can write {cwd!r}, where Python looks for modules; "
            "change to another directory, or run packet-hunterd"
        )


if __name__ == "__main__":
    refuse_unsafe_directory()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from daemon.config import Config, load  # noqa: E402
from daemon.service import Service  # noqa: E402
from nlproto import __version__  # noqa: E402
from nlproto.errors import Error, UsageError  # noqa: E402
from nlproto.foreign import foreign_packages  # noqa: E402

DEFAULT_CONFIG = "/etc/packet-hunter/daemon.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="packet-hunterd",
        description="Name the process behind each packet, keep history, serve hunters.",
        epilog="Signals: SIGTERM and SIGINT end it, SIGHUP reads the configuration again.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--engine",
        choices=("auto", "module", "packet"),
        help="where packets come from; auto: the kernel module when it is loaded",
    )
    parser.add_argument("--socket", metavar="PATH", help="UNIX socket to serve")
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file (default {DEFAULT_CONFIG}, if there)"
    )
    parser.add_argument(
        "--foreground", action="store_true", help="log to stderr, whatever the configuration says"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for line in foreign_packages():
        print(f"packet-hunterd: {line}", file=sys.stderr)

    def configuration() -> Config:
        path = options.config or (DEFAULT_CONFIG if os.path.exists(DEFAULT_CONFIG) else None)
        config = load(path) if path else Config()
        if options.engine:
            config = dataclasses.replace(config, engine=options.engine)
        if options.socket:
            config = dataclasses.replace(config, socket=os.path.abspath(options.socket))
        if options.verbose:
            config = dataclasses.replace(config, log_level="debug")
        return config

    try:
        return Service(configuration, os.environ, foreground=options.foreground).run()
    except UsageError as error:
        print(f"packet-hunterd: {error}", file=sys.stderr)
        return 2
    except Error as error:
        print(f"packet-hunterd: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
