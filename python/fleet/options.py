# SPDX-License-Identifier: MIT
"""Options that the fleet's programs share. Needs no library of the extra."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from nlproto.errors import UsageError
from nlproto.running.program import ended, teller
from nlproto.running.standard import OneLine

__all__ = ["FleetServer", "add_arguments", "checked_host", "exit_code", "make_nkey", "server_of"]

_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_DEFAULT = "nats://127.0.0.1:4222"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetServer:
    """The server's address, and our identity there."""

    urls: tuple[str, ...]
    nkey: str | None = None
    """The file with the seed of our nkey."""
    ca: str | None = None
    """The file with the certificates that sign the server's; None: the system's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a Server."""
    parser.add_argument(
        "--server",
        metavar="URL",
        action="append",
        help=f"tls://HOST:PORT, once for each server of a cluster (default {_DEFAULT})",
    )
    parser.add_argument("--nkey", metavar="FILE", help="file with the seed of our nkey")
    parser.add_argument(
        "--ca", metavar="FILE", help="file with the CA of the server (default: the system's CAs)"
    )
    parser.add_argument(
        "--make-nkey",
        action="store_true",
        help="make the file of --nkey, print the line for the server's configuration, and end",
    )


def server_of(options: argparse.Namespace) -> FleetServer:
    """Return the Server of parsed options. Raises UsageError."""
    urls = tuple(options.server or [_DEFAULT])
    for url in urls:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("tls", "nats") and parts.hostname and (parts.port or True)
        except ValueError:
            right = False
        if not right:
            raise UsageError(f"'{url}' is no address of a server: write tls://HOST:PORT")
        if parts.scheme == "nats" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            log.warning("%s: everybody on the way can read what is sent; use tls://", url)
    return FleetServer(urls, options.nkey, options.ca)


def make_nkey(options: argparse.Namespace, host: str | None) -> None:
    """Make the key of `host`, None: of collectors, and print its line. Raises Error."""
    from fleet import keys

    if options.nkey is None:
        raise UsageError("--make-nkey needs --nkey FILE, the file to make")
    print(keys.user(keys.make(options.nkey), host))


def checked_host(name: str) -> str:
    """Return `name` if it can be the end of a subject. Raises UsageError."""
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise UsageError(f"'{name}' is no host name: letters, digits, '-', '_' and dots; --host")
    return name


_EXTRA = "pip install 'packet-hunter[fleet]' (Debian: packet-hunter-fleet)"
"""Where the libraries are that a program may lack."""


def exit_code(program: str, run: Callable[[], None]) -> int:
    """Run a program. An exception becomes one line."""
    tell = teller(program)

    def begin() -> int:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine(f"{program}: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        try:
            run()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("fleet", "nlproto"):
                raise
            tell(f"no module {error.name}: {_EXTRA}")
            return 1
        return 0

    return ended(begin, tell)
