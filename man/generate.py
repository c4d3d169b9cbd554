# SPDX-License-Identifier: MIT
"""Writes the man pages and shell completions from the parsers that --help comes from.

python man/generate.py [DIRECTORY]     (default: this tree; needs argparse-manpage and shtab)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

sys.path.insert(0, str(Path(__file__).parent))

import completing

from daemon.__main__ import _parser as daemon_parser
from fleet.collect.__main__ import parser as collect_parser
from fleet.export.__main__ import parser as export_parser
from fleet.otlp.__main__ import parser as otlp_parser
from hunter.cli.arguments import live_parser, parser_of
from hunter.cli.options import SUBCOMMANDS

_DATE = "2026-11-01"


def _page(parser: argparse.ArgumentParser, section: int, summary: str, rest: str) -> str:
    parser.man_short_description = summary  # type: ignore[attr-defined]
    epilog, parser.epilog = parser.epilog or "", None
    page = Manpage(parser)
    page.manual = "packet-hunter"
    page.section = str(section)
    page.project_name = "packet-hunter"
    lines = _separated(str(page)).splitlines()
    lines[0] = f'.TH {parser.prog.upper()} "{section}" "{_DATE}" "packet-hunter" "packet-hunter"'
    return "\n".join(lines).rstrip() + "\n" + _verbatim(epilog) + rest


def _separated(page: str) -> str:
    """Two ways to call it are two lines."""
    return page.replace(
        " packet-hunter SUBCOMMAND ...", "\n.br\n.B packet\\-hunter\nSUBCOMMAND ..."
    )


def _roff(text: str) -> str:
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in lines)


def _verbatim(text: str) -> str:
    """An epilog keeps its lines; each "words:" at the margin becomes a heading."""
    parts = []
    for block in text.strip().split("\n\n"):
        head, _, body = block.partition("\n")
        if not head.endswith(":") or not body:
            head, body = "NOTES:", block
        parts.append(f".SH {head[:-1].split(',')[0].upper()}\n.nf\n{_roff(body)}\n.fi\n")
    return "".join(parts)


def _subcommands() -> str:
    parts = [".SH SUBCOMMANDS\n"]
    for name, summary in SUBCOMMANDS.items():
        help_text = parser_of(name).format_help()
        parts.append(f".SS {name}: {_roff(summary)}\n.nf\n{_roff(help_text)}\n.fi\n")
    return "".join(parts)


_SIGNALS = """\
.SH SIGNALS
SIGINT, SIGTERM and SIGHUP end the program in order, a second one at once.
With \\-w FILE, SIGUSR2 goes on in a new FILE, once the present one has been moved away
(logrotate: mv, then kill \\-USR2; not copytruncate).
"""
_EXIT = """\
.SH EXIT STATUS
0 on success, SIGINT, SIGTERM and when standard output is closed; 1 on failure; 2 on bad usage.
"""
_EXIT_OF_COMMAND = """\
With \\-\\- CMD that ended by itself: its exit code, or 128 + N when signal N ended it.
"""


def _file(name: str) -> str:
    """A file of man/ that holds roff."""
    return (Path(__file__).parent / name).read_text()


def _configuration() -> str:
    """daemon.yaml as it is installed: every name with its default and meaning."""
    text = (Path(__file__).parents[1] / "systemd/daemon.yaml").read_text()
    text = "\n".join(line for line in text.splitlines() if "SPDX" not in line)
    return f".SH CONFIGURATION\n{_file('configuration.roff')}.nf\n{_roff(text)}\n.fi\n"


def _completing() -> argparse.ArgumentParser:
    """The main options and the subcommands in one parser, as a shell sees them.

    The real ones are apart, since a first word that is no subcommand begins a filter.
    """
    parser = argparse.ArgumentParser(
        "packet-hunter", parents=[_without_words("live")], add_help=False
    )
    commands = parser.add_subparsers()
    for name, summary in SUBCOMMANDS.items():
        commands.add_parser(name, help=summary, parents=[_without_words(name)], add_help=False)
    return parser


def _without_words(name: str) -> argparse.ArgumentParser:
    parser = parser_of(name)
    for action in list(parser._actions):
        if not action.option_strings:
            parser._remove_action(action)
            for group in parser._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
        elif action.dest in ("save", "read", "filter_file", "socket", "output", "config"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in completing.VALUES:
            action.complete = {"zsh": completing.VALUES[action.dest]}  # type: ignore[attr-defined]
    return parser


def write(directory: Path) -> list[Path]:
    """Write every file below `directory` and return their paths."""
    files = {
        "man/packet-hunter.1": _page(
            live_parser(), 1, "which process owns each packet",
            _file("lines.roff") + _subcommands() + _file("files.roff") + _SIGNALS + _EXIT
            + _EXIT_OF_COMMAND
            + ".SH SEE ALSO\n.BR packet\\-hunterd (8),\n.BR tcpdump (1),\n.BR pcap\\-filter (7)\n",
        ),
        "man/packet-hunterd.8": _page(
            daemon_parser(), 8, "name packets, keep a history, answer packet-hunter",
            _configuration() + _file("daemon-files.roff") + _EXIT
            + ".SH SEE ALSO\n.BR packet\\-hunter (1),\n.BR systemd.service (5)\n",
        ),
        "man/packet-hunter-export.8": _page(
            export_parser(), 8, "send a machine's flows to the fleet's server",
            _file("export.roff") + _EXIT
            + ".SH SEE ALSO\n.BR packet\\-hunterd (8),\n.BR packet\\-hunter\\-collect (8)\n",
        ),
        "man/packet-hunter-collect.8": _page(
            collect_parser(), 8, "write what hosts sent into hours of Parquet",
            _file("collect.roff") + _EXIT
            + ".SH SEE ALSO\n.BR packet\\-hunter (1),\n.BR packet\\-hunter\\-export (8)\n",
        ),
        "man/packet-hunter-otlp.8": _page(
            otlp_parser(), 8, "send a machine's flows to an OpenTelemetry receiver",
            _EXIT + ".SH SEE ALSO\n.BR packet\\-hunterd (8),\n.BR packet\\-hunter\\-export (8)\n",
        ),
    }  # fmt: skip
    parsers = {
        "packet-hunter": _completing(),
        "packet-hunterd": daemon_parser(),
        "packet-hunter-export": export_parser(),
        "packet-hunter-collect": collect_parser(),
        "packet-hunter-otlp": otlp_parser(),
    }
    of_bash = {name: shtab.complete(parser, "bash") for name, parser in parsers.items()}
    files["completion/packet-hunter.bash"] = completing.bash(completing.bash_of_all(of_bash))
    for name, parser in parsers.items():
        text = shtab.complete(parser, "zsh")
        files[f"completion/{name}.zsh"] = text
    main = "completion/packet-hunter.zsh"
    files[main] = completing.zsh(files[main])
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    return [directory / path for path in files]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]):
        print(written)
