# SPDX-License-Identifier: MIT
"""python -m daemon: arguments, signals, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: import nothing from there before it is checked
    _current = sys.path.pop(0)
    sys.path.append(__file__.rsplit("/", 2)[0])
    from nlproto.guard import leave_current_directory

    leave_current_directory("packet-hunterd", _current)

if __name__ == "__main__":
    from nlproto.running import interrupt

    interrupt.begins("packet-hunterd")

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from daemon.service import Service  # noqa: E402
from daemon.system.config import Config, load  # noqa: E402
from nlproto.running.foreign import foreign_packages  # noqa: E402
from nlproto.running.program import Parser, ended, teller  # noqa: E402

_tell = teller("packet-hunterd")

DEFAULT_CONFIG = "/etc/packet-hunter/daemon.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="packet-hunterd",
        description="Name the process behind each packet, keep a history, answer packet-hunter.",
        epilog="Signals: SIGTERM and SIGINT end it, SIGHUP reads the configuration again.",
    )
    parser.add_version()
    parser.add_argument(
        "--engine",
        choices=("auto", "module", "ebpf", "packet"),
        help="where packets come from; auto: the module when it is loaded, else ebpf, else packet",
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
    """Run the daemon until a signal comes. Returns 0, 1 (failure) or 2 (usage)."""
    return ended(lambda: _run(_parser().parse_args(arguments)), _tell)


def _run(options: argparse.Namespace) -> int:
    for line in foreign_packages():
        _tell(line)

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

    return Service(configuration, os.environ, foreground=options.foreground).run()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # everything is written; Python would wait for threads that hang
