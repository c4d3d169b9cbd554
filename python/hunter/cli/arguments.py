# SPDX-License-Identifier: MIT
"""The command line: what may be said."""

from __future__ import annotations

import argparse
import socket
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from hunter.cli import fleet, past, values
from hunter.cli.checks import check
from hunter.cli.common import add_ends, add_limit, add_moment, add_words
from hunter.cli.options import BY, SUBCOMMANDS, CommandOptions, command_of
from hunter.show.units import UNITS
from nlproto import UsageError
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.filters.words import WORDS
from nlproto.running.program import Parser

__all__ = ["live_parser", "parse", "parser_of"]

_SUFFIXES = ".csv .jsonl .ecs.jsonl .parquet .pcapng"
FORMATS = ("csv", "jsonl", "ecs", "parquet", "pcapng")

_FILTER_HELP = """\
filter words, as in pcap-filter(7):
  tcp udp ip ip6 inbound outbound, [src|dst] host H, net N/BITS, port P,
  portrange A-B, less BYTES, greater BYTES (of the IP packet),
  pid N, pname NAME, exe PATH, cmdline TEXT, domain NAME, parent NAME|PID (any above),
  uid U, unit U, container NAME|ID, pod NAME, netns NS,
  how RULE|named|unnamed
  joined by and, or, not and ( ); a name may be a pattern with * ? [ ]
"""

_HABITS = """\
accepted as in tcpdump, without effect:
  -l -U (lines are written at once), -p (nothing is made promiscuous), -K,
  -s N (a record has no bytes; pcapng keeps 128 of a packet)
"""

_LIVE_EXAMPLES = """\
examples:
  packet-hunter                                     everything, named
  packet-hunter tcp port 443 and not pname firefox
  packet-hunter --save capture.csv --duration 60
  packet-hunter --json -c 100 how unnamed | jq .
  packet-hunter -- curl https://example.org/        of curl and what it starts; its exit code
  sudo packet-hunter -- ./check.sh                  runs as you; as root: -- sudo ./check.sh
  packet-hunter who --port 8080
first words: top who usage watch fleet web stats annotate report doctor
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Shows `-c, --count N` on every Python; before 3.13 it is `-c N, --count N`."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        default = self._get_default_metavar_for_optional(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, default)}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _parser(name: str, description: str, epilog: str = "") -> Parser:
    prog = "packet-hunter" if name == "live" else f"packet-hunter {name}"
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=_Formatter)


def _add_socket(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help=f"the daemon's socket (default: {DEFAULT_SOCKET}, if it is there)",
    )


def _add_numbers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-n", "--numbers", action="store_true", help="no names of hosts and services"
    )


def _add_json(parser: argparse._ActionsContainer, help: str = "one JSON object") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def _add_files(
    parser: argparse.ArgumentParser, read: str, written: str, several: bool = False
) -> None:
    parser.add_argument("input", metavar="IN", nargs="+" if several else None, help=read)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help=written)


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where packets come from")
    _add_socket(group)
    group.add_argument(
        "--direct",
        action="store_true",
        help="read the module or capture here; ask the daemon only for owners",
    )
    group.add_argument(
        "--engine",
        metavar="E",
        choices=("auto", "module", "ebpf", "packet"),
        default="auto",
        help="without the daemon or with --direct: module, ebpf, packet, or auto (default)",
    )
    group.add_argument(
        "-B",
        "--buffer",
        metavar="KIB",
        type=values.buffer,
        help="room for waiting packets in engine packet, without the daemon (default: 16384)",
    )
    about = "without the daemon: far ends' names from DNS (default), TLS to port 443 too (sni), off"
    group.add_argument("--domains", choices=("dns", "sni", "off"), default="dns", help=about)
    group.add_argument(
        "-r",
        "--read",
        metavar="FILE",
        action="append",
        help="show a saved capture of any format, compressed or not; - is standard input"
        " (repeatable: all in order of time)",
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which packets (all given must fit)")
    group.add_argument("filter", nargs="*", metavar="FILTER", help="filter words, see below")
    group.add_argument("-F", "--filter-file", metavar="FILE", help="read the filter from FILE")
    group.add_argument(
        "-i", "--interface", metavar="IF", action="append", help="on this interface (repeatable)"
    )
    group.add_argument(
        "-Q", "--direction", metavar="D", choices=("in", "out", "inout"), help="in, out or inout"
    )
    group.add_argument("--pid", metavar="P", action="append", help="of this process (repeatable)")
    group.add_argument(
        "--pname", metavar="NAME", action="append", help="of processes with this name"
    )
    group.add_argument("--uid", metavar="U", action="append", help="of this user's processes")
    group.add_argument("--netns", metavar="NS", action="append", help="in a network namespace")
    add_words(
        group,
        (
            ("--container", "C", "of a container: its name, or its id or the beginning of it"),
            ("--pod", "P", "of a pod: NAME or NAMESPACE/NAME"),
            ("--unit", "U", "of a systemd unit"),
            ("--parent", "P", "of descendants of this process: its name or pid"),
            ("--exe", "PATH", "of a program: its path or name"),
            ("--cmdline", "TEXT", "with TEXT in the command line"),
        ),
        repeatable=True,
    )


def live_parser() -> argparse.ArgumentParser:
    """Return the parser of the main command, without what follows "--"."""
    parser = _parser(
        "live",
        "Show, save and filter packets with the process behind each.",
        f"{_FILTER_HELP}\n{_HABITS}\n{_LIVE_EXAMPLES}",
    )
    parser.usage = (
        "%(prog)s [options] [FILTER ...] [-- CMD ARGS ...]\n       %(prog)s SUBCOMMAND ..."
    )
    parser.add_version()
    _add_choice(parser)
    group = parser.add_argument_group("how long")
    group.add_argument("-c", "--count", metavar="N", type=values.count, help="end after N packets")
    group.add_argument(
        "--duration", metavar="S", type=values.seconds, help="end after S seconds (60s, 5m)"
    )
    group.add_argument(
        "--all",
        action="store_true",
        help="with -- CMD: all packets, not only those of CMD and its descendants",
    )
    group = parser.add_argument_group("how lines look, as in tcpdump")
    _add_numbers(group)
    group.add_argument(
        "-q", "--quiet", action="count", default=0, help="shorter lines; -qq: also no account"
    )
    group.add_argument("-v", "--verbose", action="count", default=0, help="more of the owner; -vv")
    group.add_argument(
        "-t",
        dest="times",
        action="count",
        default=0,
        help="no time; -tt Unix time, -ttt since the line before, -tttt with date, -ttttt since"
        " the first",
    )
    _add_json(group, "JSON lines on standard output")
    group.add_argument(
        "--summary", action="store_true", help="a table of processes at the end, instead of lines"
    )
    group = parser.add_argument_group("saving")
    group.add_argument(
        "--save",
        "-w",
        metavar="FILE",
        help=f"save to FILE ({_SUFFIXES}; - is standard output)",
    )
    group.add_argument(
        "--format", metavar="F", choices=FORMATS, help=f"when the suffix is none of {_SUFFIXES}"
    )
    group.add_argument(
        "--print", action="store_true", help="show lines too, with --save or --summary"
    )
    group.add_argument(
        "-C",
        "--rotate",
        metavar="SIZE",
        type=values.size,
        help="new file every SIZE million bytes (1g)",
    )
    group.add_argument(
        "-W", "--keep", metavar="N", type=values.count, help="with -C: keep the last N files"
    )
    _add_process_blocks(group)
    _add_source(parser)
    _add_habits(parser)
    return parser


class _NotHere(argparse.Action):
    """An option of tcpdump's about data that a record does not have."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(
            f"{self.option_strings[0]}: bytes and link headers are not shown; save them with"
            " -w x.pcapng and open that in Wireshark, or tcpdump -r x.pcapng -e -X"
        )


class _ListInterfaces(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print("".join(f"{index}.{name}\n" for index, name in socket.if_nameindex()), end="")
        parser.exit()


def _add_habits(parser: argparse.ArgumentParser) -> None:
    """Options that users of tcpdump are used to type."""
    group = parser.add_argument_group("as in tcpdump")
    group.add_argument(
        "-D", "--list-interfaces", nargs=0, action=_ListInterfaces, help="list interfaces, and end"
    )
    for letter in ("-l", "-U", "-p", "-K"):
        group.add_argument(letter, action="store_true", dest="habit", help=argparse.SUPPRESS)
    group.add_argument("-s", metavar="N", type=int, dest="habit", help=argparse.SUPPRESS)
    for letters in (["-A"], ["-X"], ["-x"], ["-e"]):
        group.add_argument(*letters, nargs=0, action=_NotHere, help=argparse.SUPPRESS)


def _top_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "top",
        "Processes by rate, live. Keys are shown below the table.",
        _FILTER_HELP
        + "\nexamples:\n  packet-hunter top\n  packet-hunter top -u si-bits not port 22\n",
    )
    _add_choice(parser)
    _add_numbers(parser)
    parser.add_argument(
        "-u", "--units", metavar="U", choices=UNITS, default=UNITS[0], help=" ".join(UNITS)
    )
    parser.add_argument(
        "-d",
        "--interval",
        metavar="S",
        type=values.interval,
        default=1.0,
        help="time between two updates (1s)",
    )
    _add_source(parser)
    return parser


def _who_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "who",
        "Say which process owns or owned the traffic of a port, host or process; with none, what"
        " listens. Exits 1 when nobody is found.",
        "examples:\n  packet-hunter who                        what listens\n"
        "  packet-hunter who 8080\n"
        "  packet-hunter who --port 53 --proto udp --since 10m --json\n"
        "  packet-hunter who --pname nginx --since 14:00 --until 14:30 --by host\n"
        "  packet-hunter who --by container\n",
    )
    parser.add_argument(
        "port",
        metavar="PORT",
        nargs="?",
        type=values.used_port,
        help="local or remote port, or its service",
    )
    parser.add_argument(
        "--port", metavar="N", type=values.used_port, dest="port_too", help="the same"
    )
    add_ends(parser)
    parser.add_argument("--pid", metavar="P", type=values.pid, help="what this process talks to")
    add_words(
        parser,
        (
            ("--pname", "NAME", "what processes with this name talk to"),
            ("--unit", "U", "what runs in this unit talks to"),
            ("--container", "C", "the same for this container: its name or id"),
            ("--pod", "POD", "the same for this pod"),
            ("--domain", "NAME", "who talks to the host with this name"),
        ),
    )
    parser.add_argument(
        "--netns",
        metavar="NS",
        help="in this network namespace alone: its name, a pid or its inode",
    )
    add_moment(
        parser, "--since", "seen within this time (60s, 5m), or since 14:30, 2026-05-28 or both"
    )
    add_moment(parser, "--until", "begun before that time; leaves out what is open now")
    parser.add_argument(
        "--by", metavar="KEY", choices=BY, help=f"sums instead of rows: by {', '.join(BY)}"
    )
    add_limit(parser, "at most N rows of a table (default: 50); with --json: N flows (1000)")
    _add_json(parser)
    _add_socket(parser)
    return parser


def _usage_parser() -> argparse.ArgumentParser:
    parser = past.usage(_parser)
    _add_json(parser)
    _add_socket(parser)
    return parser


def _watch_parser() -> argparse.ArgumentParser:
    parser = past.watch(_parser)
    _add_socket(parser)
    return parser


def _fleet_parser() -> argparse.ArgumentParser:
    parser = _parser("fleet", fleet.DESCRIPTION, fleet.EXAMPLES)
    fleet.add_arguments(parser)
    _add_json(parser)
    _add_socket(parser)
    return parser


def _web_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "web",
        "Serve a page on loopback: processes by rate, live, and questions to the history. It shows"
        " what the daemon shows to you. Whoever has the printed address can see it.",
        "example:\n  sudo packet-hunter web --port 8470\n",
    )
    parser.add_argument(
        "--port", metavar="N", type=values.port, default=0, help="on 127.0.0.1 (default: any free)"
    )
    _add_socket(parser)
    return parser


def _stats_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "stats",
        "What the daemon has seen, lost and named.",
        "example:\n  packet-hunter stats --json\n",
    )
    _add_json(parser)
    _add_socket(parser)
    return parser


def _annotate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "annotate",
        "Write who owned each packet into a capture made by tcpdump or Wireshark.",
        "example:\n  sudo tcpdump -i any -w trace.pcap    (while the daemon runs)\n"
        "  packet-hunter annotate trace.pcap -o named.pcapng\n",
    )
    _add_files(
        parser,
        "pcap or pcapng, compressed or not; - is standard input",
        "pcapng to write; - is standard output",
    )
    parser.add_argument(
        "--netns",
        metavar="NS",
        help="network namespace of the capture, by name, pid or inode; without it packets"
        " that fit in several are marked AMBIGUOUS",
    )
    _add_process_blocks(parser)
    _add_socket(parser)
    return parser


def _add_process_blocks(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--process-blocks",
        action="store_true",
        help="in pcapng: a block for each process; Wireshark up to 4.6 counts it as a frame",
    )


def _report_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "report",
        "Make one HTML page of a saved capture; it needs no network to open.",
        "example:\n  packet-hunter report capture.csv -o capture.html\n",
    )
    _add_files(
        parser,
        "saved capture of any format, compressed or not; - is standard input",
        "HTML file to write; - is standard output",
        several=True,
    )
    return parser


def _doctor_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "doctor",
        "What works here: packages, module, probes, daemon. Exits 1 if something is wrong.",
        "example:\n  sudo packet-hunter doctor\n",
    )
    _add_socket(parser)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of "live" or of a subcommand."""
    return {
        "live": live_parser,
        "top": _top_parser,
        "who": _who_parser,
        "usage": _usage_parser,
        "watch": _watch_parser,
        "fleet": _fleet_parser,
        "web": _web_parser,
        "stats": _stats_parser,
        "annotate": _annotate_parser,
        "report": _report_parser,
        "doctor": _doctor_parser,
    }[name]()


def parse(arguments: Sequence[str]) -> CommandOptions:
    """Return the command in `arguments` (sys.argv[1:]). Raises UsageError."""
    argv: tuple[str, ...] = ()
    arguments = list(arguments)
    if arguments and arguments[0] in SUBCOMMANDS:
        name = arguments.pop(0)
    else:
        name = "live"
        if "--" in arguments:
            at = arguments.index("--")
            argv = tuple(arguments[at + 1 :])
            arguments = arguments[:at]
            if not argv:
                raise UsageError("a command must follow --, as in: packet-hunter -- curl URL")
    parser = parser_of(name)
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if name == "live" and parsed.filter and parsed.filter[0] in SUBCOMMANDS:
        raise UsageError(f"{parsed.filter[0]!r} is a subcommand: write it before the options")
    if unknown:
        said = unknown[0].lstrip("-").partition("=")[0]
        hint = f"; in a filter it is '{said} ...'" if name == "live" and said in WORDS else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if name == "who":
        parsed.port = parsed.port_too if parsed.port is None else parsed.port
    command = command_of(name, parsed, argv)
    check(command)
    return command
