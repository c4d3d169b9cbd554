# SPDX-License-Identifier: MIT
"""python -m fleet.otlp: arguments, signals, exit codes."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # -m puts the current directory first: import nothing from there before it is checked
    _current = sys.path.pop(0)
    sys.path.append(__file__.rsplit("/", 3)[0])
    from nlproto.guard import leave_current_directory

    leave_current_directory("packet-hunter-otlp", _current)

if __name__ == "__main__":
    from nlproto.running import interrupt

    interrupt.begins("packet-hunter-otlp")

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from urllib.parse import unquote, urlsplit  # noqa: E402

from fleet.options import exit_code  # noqa: E402
from nlproto.client.frames import DEFAULT_SOCKET  # noqa: E402
from nlproto.errors import UsageError  # noqa: E402
from nlproto.running.program import Parser  # noqa: E402

DEFAULT_ENDPOINT = "http://127.0.0.1:4318/v1/logs"


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        prog="packet-hunter-otlp",
        description="Send what this machine's processes do on the network to an OpenTelemetry"
        " receiver, as logs (OTLP/HTTP, JSON).",
        epilog="Headers, as a key, come from OTEL_EXPORTER_OTLP_HEADERS (NAME=VALUE,...). SIGTERM"
        " ends it.",
    )
    made.add_version()
    made.add_argument(
        "--socket", metavar="PATH", default=DEFAULT_SOCKET, help="the daemon's socket"
    )
    made.add_argument(
        "--endpoint",
        metavar="URL",
        default=DEFAULT_ENDPOINT,
        help="the receiver's, with its path (default %(default)s)",
    )
    made.add_argument(
        "--host",
        metavar="NAME",
        help="this host's name in the records (default: this machine's name)",
    )
    made.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="what a flow did in so many seconds is one record (default %(default)g)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code("packet-hunter-otlp", lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    from fleet.export.source import FlowSource
    from fleet.otlp.sender import Receiver, Sender

    if not 0.1 <= options.interval <= 3600:
        raise UsageError("--interval is from 0.1 to 3600 seconds")
    receiver = Receiver(_checked(options.endpoint), _headers())
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with FlowSource(options.socket) as source:
        host = options.host or socket.gethostname()
        sender = Sender(source, receiver, host, options.interval, stopping)
        sender.run()
    logging.info("%d sent, %d refused, %d lost", sender.sent, sender.refused, sender.lost)


def _checked(url: str) -> str:
    """Raises UsageError."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        right = False
    if not right or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"{url!r} is no address of a receiver: write https://HOST:4318/v1/logs")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        logging.warning("%s: everybody on the way can read what is sent; use https://", url)
    return url


def _headers() -> dict[str, str]:
    """Raises UsageError."""
    found = {}
    for pair in filter(None, os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(",")):
        name, equals, value = (unquote(part.strip()) for part in pair.partition("="))
        if not (equals and name and f"{name}{value}".isascii() and f"{name}{value}".isprintable()):
            raise UsageError("OTEL_EXPORTER_OTLP_HEADERS is written NAME=VALUE,NAME=VALUE")
        found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
