# SPDX-License-Identifier: MIT
"""python -m fleet.collect: arguments, signals, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: import nothing from there before it is checked
    _current = sys.path.pop(0)
    sys.path.append(__file__.rsplit("/", 3)[0])
    from nlproto.guard import leave_current_directory

    leave_current_directory("packet-hunter-collect", _current)

if __name__ == "__main__":
    from nlproto.running import interrupt

    interrupt.begins("packet-hunter-collect")

import argparse  # noqa: E402
import asyncio  # noqa: E402
import logging  # noqa: E402
import signal  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from fleet.options import add_arguments, exit_code, make_nkey, server_of  # noqa: E402
from nlproto.errors import UsageError  # noqa: E402
from nlproto.running.program import Parser  # noqa: E402

DEFAULT_DIRECTORY = "/var/lib/packet-hunter-collect"
_DAY = 86400.0
_LONGEST = 36_500  # days


def parser() -> Parser:
    """Return the parser; it needs no library of the extra."""
    made = Parser(
        prog="packet-hunter-collect",
        description="Write what hosts sent to the fleet's server into hours of Parquet.",
        epilog="Any number of them may run, on one folder or several. SIGTERM ends one.",
    )
    made.add_version()
    made.add_argument(
        "directory",
        nargs="?",
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="folder for the hours (default %(default)s)",
    )
    add_arguments(made)
    made.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=20.0,
        help="between two files; answers are so much behind (default %(default)g)",
    )
    made.add_argument(
        "--keep", metavar="DAYS", type=float, default=30.0, help="of flows (default %(default)g)"
    )
    made.add_argument(
        "--keep-sums",
        metavar="DAYS",
        type=float,
        default=396.0,
        help="of each hour's sums (default %(default)g)",
    )
    made.add_argument(
        "--clickhouse",
        metavar="URL",
        help="write into https://[USER:PASSWORD@]HOST:8443/DATABASE, too (@FILE: the URL is in it)",
    )
    made.add_argument(
        "--replicas",
        metavar="N",
        type=int,
        default=1,
        help="of the stream, if this has to make it; 3 in a cluster (default %(default)s)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code("packet-hunter-collect", lambda: _run(parser().parse_args(arguments)))


def _url(text: str) -> str:
    """A password belongs into a file: every user sees command lines."""
    if not text.startswith("@"):
        return text
    try:
        with open(text[1:], encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {text[1:]}: {error}") from None


def _run(options: argparse.Namespace) -> None:
    from fleet import bus
    from fleet.collect.clickhouse import ClickHouseStore
    from fleet.collect.collector import BatchStore, Collector
    from fleet.collect.parquet import ParquetStore
    from fleet.collect.tidy import Tidier

    if not 0.1 <= options.interval <= bus.ACK_WAIT / 3:
        raise UsageError(f"--interval is from 0.1 to {bus.ACK_WAIT / 3:g} seconds")
    if not 0 < options.keep <= options.keep_sums <= _LONGEST:
        raise UsageError(f"--keep is above 0 days, --keep-sums from that to {_LONGEST}")
    if not 1 <= options.replicas <= 5:
        raise UsageError("--replicas is from 1 to 5, of as many servers")
    server = server_of(options)
    if options.make_nkey:
        make_nkey(options, None)
        return
    store = ParquetStore(options.directory, options.keep * _DAY)

    stores: list[BatchStore] = [store]
    if options.clickhouse is not None:
        stores.append(ClickHouseStore(_url(options.clickhouse), options.keep * _DAY))

    async def serve() -> Collector:
        loop = asyncio.get_running_loop()
        tidy = Tidier(store, options.keep_sums * _DAY).tidy
        collector = Collector(server, stores, options.interval, options.replicas, tidy)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, collector.stop)
        await collector.run()
        return collector

    collector = asyncio.run(serve())
    logging.info(
        "%d rows collected, %d malformed messages, %d rows out of time",
        *(collector.collected, collector.malformed, store.untimely),
    )


if __name__ == "__main__":
    sys.exit(main())
