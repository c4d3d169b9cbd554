# SPDX-License-Identifier: MIT
"""What shtab does not know: filter words, and values that the machine itself has."""

from __future__ import annotations

from hunter.cli.arguments import parser_of
from hunter.cli.options import SUBCOMMANDS
from nlproto.filters.words import WORDS
from nlproto.records import wire

__all__ = ["VALUES", "bash", "bash_of_all", "zsh"]

_HOWS = " ".join(
    ["named", "unnamed", *(one for one in wire.HOW_NAMES if not one.startswith("how_"))]
)

VALUES = {
    "interface": "_net_interfaces",
    "pid": "_pids",
    "uid": "_users",
    "host": "_hosts",
    "port": "_ports",
}
"""Options whose values zsh itself can list, and by which function."""

_SHARED = "_shtab_complete"

_BASH = """
# --- filter words, and values that this machine has
_packet_hunter_values() { # WORD: what may follow it, a line each; fails when anything may
  case $1 in
    -i | --interface) (cd /sys/class/net && printf '%%s\\n' any *) ;;
    pid | --pid) (cd /proc && printf '%%s\\n' [0-9]*) ;;
    pname | --pname | parent | --parent) cat /proc/[0-9]*/comm 2>/dev/null ;;
    uid | --uid) compgen -u ;;
    host | --host) compgen -A hostname ;;
    port | --port) compgen -A service ;;
    netns | --netns) (cd /run/netns 2>/dev/null && printf '%%s\\n' *) ;;
    unit | --unit) systemctl list-units --plain --no-legend 2>/dev/null | cut -d' ' -f1 ;;
    how) printf '%%s\\n' %(hows)s ;;
    container | --container | pod | --pod | net | portrange | mask | ifindex | less | greater) ;;
    *) return 1 ;;
  esac
  return 0
}

_packet_hunter_offer() { # lines on stdin; names that a shell could act on are left out
  local line
  while IFS= read -r line; do
    [[ $line == "${COMP_WORDS[COMP_CWORD]}"* && $line =~ ^[A-Za-z0-9_./:@+-]+$ ]] &&
      COMPREPLY+=("$line")
  done
}

_packet_hunter() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} at values
  COMPREPLY=()
  for ((at = 1; at < COMP_CWORD; at++)); do
    if [ "${COMP_WORDS[at]}" = -- ]; then # another command's line
      if declare -F _command_offset >/dev/null; then
        _command_offset $((at + 1))
      elif ((at + 1 == COMP_CWORD)); then
        _packet_hunter_offer < <(compgen -c -- "$current" | sort -u)
      fi
      return
    fi
  done
  if ((COMP_CWORD > 1)) && [[ " %(others)s " == *" ${COMP_WORDS[1]} "* ]]; then
    case $before in
      --pid | --pname | --port | --host) ;;
      *) _shtab_packet_hunter; return ;;
    esac
  fi
  if values=$(_packet_hunter_values "$before"); then
    _packet_hunter_offer < <(printf '%%s\\n' "$values" | sort -u)
    return
  fi
  case $before in
    %(valued)s)
      _shtab_packet_hunter
      return
      ;;
  esac
  if [ "${current:0:1}" = - ]; then
    _shtab_packet_hunter
    return
  fi
  _packet_hunter_offer < <(printf '%%s\\n' %(words)s)
  ((COMP_CWORD > 1)) || _packet_hunter_offer < <(printf '%%s\\n' %(commands)s)
}

complete -o bashdefault -F _packet_hunter packet-hunter
"""


def _valued() -> set[str]:
    """Options of the main command and of top that a value follows."""
    parsers = (parser_of("live"), parser_of("top"))
    return {
        option
        for parser in parsers
        for action in parser._actions
        if action.nargs != 0
        for option in action.option_strings
    }


def bash_of_all(scripts: dict[str, str]) -> str:
    """Join what shtab makes of several programs: what differs is variables and two lines."""
    first = next(iter(scripts.values()))
    head = first[: first.index("\n\n")].splitlines()[0]
    shared, parts = "", []
    for name, script in scripts.items():
        function = f"_shtab_{name.replace('-', '_')}"
        start, end = script.index("# $1=COMP_WORDS[1]\n"), script.index("\ncomplete ")
        middle = script[start:end]
        for own in (f"{function}() {{", f"local prefix={function}\n"):
            assert middle.count(own) == 1
        middle = middle.replace(f"{function}() {{", f"{_SHARED}() {{ # the program's prefix")
        middle = middle.replace(f"local prefix={function}\n", "local prefix=$1\n")
        assert middle == shared or not shared
        shared = middle
        variables = script[script.index("\n\n") : start].strip()
        while "\n\n" in variables:
            variables = variables.replace("\n\n", "\n")
        parts.append(f"# --- {name}\n{variables}\n{function}() {{ {_SHARED} {function}; }}\n")
        parts.append(f"complete -o bashdefault -F {function} {name}\n\n")
    return f"{head}\n\n{shared.rstrip()}\n\n" + "".join(parts).rstrip() + "\n"


def bash(script: str) -> str:
    """Return shtab's completion of packet-hunter with filter words."""
    others = " ".join(name for name in SUBCOMMANDS if name != "top")
    return (
        script.rstrip()
        + "\n"
        + _BASH
        % {
            "hows": _HOWS,
            "words": " ".join(WORDS),
            "commands": " ".join(SUBCOMMANDS),
            "others": others,
            "valued": " | ".join(sorted(_valued())),
        }
    )


def zsh(script: str) -> str:
    """The same for zsh."""
    words = " ".join(WORDS)
    commands = "  _describe 'packet-hunter commands' _commands\n"
    last = "        who) _arguments -C -s $_shtab_packet_hunter_who_options ;;\n"
    assert commands in script and last in script
    first = f"{commands}  local _words=({words})\n  _describe 'filter words' _words\n"
    rest = (
        f"        *) _arguments -C -s $_shtab_packet_hunter_options '*:filter word:({words})' ;;\n"
    )
    return script.replace(commands, first).replace(last, last + rest)
