# SPDX-License-Identifier: MIT
"""Options that contradict each other."""

from __future__ import annotations

import math

from hunter.cli.options import CommandOptions, FleetOptions, LiveOptions, WhoOptions
from nlproto import UsageError

__all__ = ["check"]


def check(command: CommandOptions) -> None:
    """Raise UsageError for options that contradict each other."""
    if isinstance(command, WhoOptions | FleetOptions):
        _check_range(command)
    if isinstance(command, FleetOptions):
        _check_fleet(command)
    elif isinstance(command, LiveOptions):
        _check_live(command)


def _check_fleet(options: FleetOptions) -> None:
    if options.by and options.question not in ("usage", "map"):
        raise UsageError("--by is of usage and map")
    if options.by == "domain" and options.question == "map":
        raise UsageError("map draws processes by where they run: --by has no domain there")
    if options.html and options.question != "map":
        raise UsageError("--html is of map")
    if options.html == "-" and options.json:
        raise UsageError("standard output cannot hold both: give --html a file")


def _check_range(options: WhoOptions | FleetOptions) -> None:
    since = math.inf if options.since is None else options.since
    if options.until and options.until >= since:
        raise UsageError("--until is before --since: nothing is between them")


def _check_live(options: LiveOptions) -> None:
    if options.keep and not options.rotate:
        raise UsageError("-W says how many files -C keeps: give -C SIZE too")
    if options.rotate and (not options.save or options.save == "-"):
        raise UsageError("-C rotates the file of --save: give --save FILE too")
    if options.format and not options.save:
        raise UsageError("--format goes with --save: give --save FILE too")
    if options.save == "-" and (options.json or options.print):
        raise UsageError("standard output cannot hold both: save to a file")
    if options.origin.read and (options.origin.direct or options.argv):
        raise UsageError("-r reads a file: --direct and -- CMD do not go with it")
