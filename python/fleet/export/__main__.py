# SPDX-License-Identifier: MIT
"""python -m fleet.export: arguments, signals, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: import nothing from there before it is checked
    _current = sys.path.pop(0)
    sys.path.append(__file__.rsplit("/", 3)[0])
    from nlproto.guard import leave_current_directory

    leave_current_directory("packet-hunter-export", _current)

if __name__ == "__main__":
    from nlproto.running import interrupt

    interrupt.begins("packet-hunter-export")

import argparse  # noqa: E402
import asyncio  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from fleet.options import add_arguments, checked_host, exit_code, make_nkey, server_of  # noqa: E402
from nlproto.client.frames import DEFAULT_SOCKET  # noqa: E402
from nlproto.errors import UsageError  # noqa: E402
from nlproto.running.program import Parser  # noqa: E402

DEFAULT_SPOOL = "/var/lib/packet-hunter-export"


def parser() -> Parser:
    """Return the parser; it needs no library of the extra."""
    made = Parser(
        prog="packet-hunter-export",
        description="Send what this machine's processes do on the network to the fleet's server.",
        epilog="It needs no privilege but to be a member of the daemon's group. SIGTERM ends it.",
    )
    made.add_version()
    made.add_argument(
        "--socket", metavar="PATH", default=DEFAULT_SOCKET, help="the daemon's socket"
    )
    add_arguments(made)
    made.add_argument(
        "--host",
        metavar="NAME",
        help="this host's name on the server (default: this machine's name)",
    )
    made.add_argument(
        "--spool",
        metavar="DIR",
        default=DEFAULT_SPOOL,
        help="where batches wait for the server (default %(default)s)",
    )
    made.add_argument(
        "--spool-size",
        metavar="MIB",
        type=int,
        default=256,
        help="beyond it the oldest batches are lost, and counted (default %(default)s)",
    )
    made.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="what a flow did in so many seconds is one row (default %(default)g)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code("packet-hunter-export", lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    from fleet.export.exporter import Exporter
    from fleet.export.source import FlowSource
    from fleet.export.spool import Spool

    if options.spool_size < 1 or not 0.1 <= options.interval <= 3600:
        raise UsageError("--spool-size is 1 MiB at least, --interval from 0.1 to 3600 seconds")
    host = checked_host(options.host or socket.gethostname())
    server = server_of(options)
    if options.make_nkey:
        make_nkey(options, host)
        return
    os.makedirs(options.spool, mode=0o700, exist_ok=True)
    spool = Spool(options.spool, options.spool_size << 20)
    if spool.damaged is not None:
        logging.error("the spool was damaged; it is %s now", spool.damaged)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        with FlowSource(options.socket) as source:
            exporter = Exporter(source, spool, server, host, options.interval)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, exporter.stop)
            await exporter.run()

    asyncio.run(serve())
    totals = spool.totals()
    logging.info(
        "%d rows exported = %d acknowledged + %d spooled + %d lost",
        totals.exported,
        totals.acknowledged,
        totals.spooled,
        totals.lost,
    )


if __name__ == "__main__":
    sys.exit(main())
