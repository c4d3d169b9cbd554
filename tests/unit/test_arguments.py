# SPDX-License-Identifier: MIT
"""The command line: words, options and the filter they amount to; pages made from the parsers."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from daemon.system.config import Config
from hunter.cli.arguments import live_parser, parse, parser_of
from hunter.cli.choice import filter_of
from hunter.cli.options import SUBCOMMANDS, LiveOptions, WhoOptions
from hunter.show.columns import FLAGS
from nlproto import UsageError
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.filters.mistakes import FilterError
from nlproto.records import wire
from waiting import stand_in, there

TREE = Path(__file__).parents[2]


def live(words: Any) -> Any:
    command = parse(words)
    assert isinstance(command, LiveOptions)
    return command


def filter_text(*words: Any) -> str:
    return str(filter_of(live(words).choice))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["tcp", "port", "80"], "tcp and port 80"),
        (["tcp port 80"], "tcp and port 80"),
        (["tcp", "-c", "5", "port", "80"], "tcp and port 80"),
        (["pname", "a b"], 'pname "a b"'),
        (['pname "a b"'], 'pname "a b"'),
        (["--pid", "4", "--pid", "5"], "pid 4 or pid 5"),
        (["--pid", "4", "--uid", "0"], "pid 4 and uid 0"),
        (["--pname", "or"], 'pname "or"'),
        (["-Q", "in"], "inbound"),
        (["-Q", "inout"], ""),
        (["-i", "any"], ""),
        (["udp or tcp", "-Q", "out"], "(udp or tcp) and outbound"),
    ],
)
def test_words_and_options_make_one_filter(words: list[Any], text: str) -> None:
    assert filter_text(*words) == text


def test_an_interface_counts_in_its_own_network_namespace_only() -> None:
    here = os.stat("/proc/self/ns/net").st_ino
    index = socket.if_nametoindex("lo")
    assert filter_text("-i", "lo") == f"netns {here} and ifindex {index}"


def test_a_first_word_is_a_subcommand_and_anything_else_a_filter() -> None:
    who = stand_in(parse(["who", "--port", "http"]))
    assert isinstance(who, WhoOptions) and who.port == 80
    assert isinstance(parse(["tcp"]), LiveOptions)
    with pytest.raises(UsageError, match="before the options"):
        parse(["-n", "top"])
    with pytest.raises(FilterError, match="pname nginx"):
        filter_text("nginx")


def test_what_follows_two_dashes_is_the_command() -> None:
    command = live(["tcp", "--", "curl", "-v", "--json"])
    assert command.argv == ("curl", "-v", "--json") and not command.json


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5", 1.5), ("500ms", 0.5), ("5m", 300), ("2h", 7200)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert live(["--duration", text]).duration == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1", 10**6), ("4k", 4096), ("2M", 2 << 20), ("1g", 1 << 30)]
)
def test_sizes_are_tcpdumps_millions_or_powers_of_two(text: str, size: int) -> None:
    assert live(["--save", "x.csv", "-C", text]).rotate == size


@pytest.mark.parametrize(
    "words",
    [
        ["-W", "3", "--save", "x.csv"],
        ["-C", "1"],
        ["--format", "csv"],
        ["--save", "-", "--json"],
        ["-r", "x.csv", "--direct"],
        ["--"],
        ["who", "--since", "5m", "--until", "10m"],
        ["who", "--since", "5m", "--until", "5m"],
    ],
)
def test_options_that_make_no_sense_together_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "-1"],
        ["--duration", "soon"],
        ["--engine", "x"],
        ["-Q", "up"],
        ["who", "80800"],
        ["who", "\udcff"],
        ["who", "--since", "25:00"],
        ["who", "--since", "9999-01-01"],
        ["who", "--by", "colour"],
        ["top", "-d", "0"],
    ],
)
def test_bad_values_are_one_line_that_names_the_help(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*; see packet-hunter.* --help$"):
        parse(words)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("2h", 7200),
        ("11:30", 1800),
        ("9:00:30", 10770),
        ("12:30", 23.5 * 3600),
        ("2026-05-28", 12 * 3600),
        ("2026-05-28 11:59:30", 30),
        ("2026-05-27T12:00", 86400),
    ],
)
def test_a_moment_is_a_span_a_clock_time_or_a_date(
    text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 5, 28, 12, 0, 0)

    monkeypatch.setattr("hunter.cli.values.datetime", Noon)
    who = stand_in(parse(["who", "8080", "--since", text]))
    assert (who.port, who.since) == (8080, seconds)


@pytest.mark.parametrize(
    ("now", "text", "hours"),
    [
        ("2026-10-25 02:30 second", "02:00", 0.5),
        ("2026-10-25 02:30 second", "02:45", 0.75),
        ("2026-10-25 02:30 first", "02:00", 0.5),
        ("2026-10-25 02:30 second", "2026-10-25 02:15", 0.25),
        ("2026-10-25 10:00 first", "01:00", 10),
        ("2026-10-26 10:00 first", "2026-10-25 02:00", 32),
        ("2027-03-28 10:00 first", "01:00", 8),
        ("2027-03-28 00:10 first", "23:50", 1 / 3),
    ],
)
def test_clock_times_are_right_where_clocks_were_set(
    now: str, text: str, hours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In central Europe. Of two moments with one time the last one is meant."""
    local, _, which = now.rpartition(" ")

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromisoformat(local).replace(fold=which == "second")

    monkeypatch.setattr("hunter.cli.values.datetime", Then)
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        assert stand_in(parse(["who", "--since", text])).since == hours * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


def test_who_without_a_question_asks_what_listens() -> None:
    assert (
        stand_in(parse(["who"])).listening and stand_in(parse(["who", "--proto", "udp"])).listening
    )
    for words in (["80"], ["--port", "80"], ["--by", "unit"], ["--since", "5m"], ["--pid", "1"]):
        assert not stand_in(parse(["who", *words])).listening


def test_the_letters_that_tcpdump_has_too_mean_the_same() -> None:
    """man tcpdump: what each of these is for."""
    letters = {option for action in live_parser()._actions for option in action.option_strings}
    short = {letter for letter in letters if re.fullmatch("-[A-Za-z]", letter)}
    assert short == {f"-{letter}" for letter in "hVFiQcnqvtwCWrBDlUpKsAXxe"}


def test_tcpdumps_habits_change_nothing() -> None:
    words = ["-l", "-U", "-p", "-K", "-s", "0", "-s128", "-lnn", "-i", "any", "tcp"]
    assert filter_text(*words) == "tcp" and live(words).numbers


def test_interfaces_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["-D"])
    assert ended.value.code == 0
    index = socket.if_nametoindex("lo")
    assert f"{index}.lo\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["-A", "-X", "-XX", "-e", "-nX", "-x"])
def test_what_a_record_does_not_have_is_looked_for_elsewhere(option: str) -> None:
    with pytest.raises(UsageError, match="-w x.pcapng"):
        parse([option])


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("stat", "'stats'"),
        ("wo", "'who'"),
        ("topp", "'top'"),
        ("annotat x.pcap", "'annotate'"),
        ("prot 80", "'port'"),
        ("help", "'--help'"),
        ("version", "'--version'"),
    ],
)
def test_a_first_word_that_is_nearly_a_subcommand_is_asked_about(word: str, meant: str) -> None:
    first = word.split()[0]
    with pytest.raises(FilterError, match=f"unknown word '{first}'; did you mean {meant}"):
        filter_text(word)


@pytest.mark.parametrize("word", ["port", "how"])
def test_a_word_of_the_language_is_no_subcommand_that_is_misspelt(word: str) -> None:
    with pytest.raises(FilterError, match=f"'{word}' needs a value after it"):
        filter_text(word)


@pytest.mark.parametrize(
    "words", [["who", "--user", "root", "80"], ["who", "--user=x", "80x"], ["fleet", "--user"]]
)
def test_an_unknown_option_is_told_before_what_its_value_seems_to_be(words: list[str]) -> None:
    unknown = "--question" if words[0] == "fleet" else "--user"
    words = [word.replace("--user", unknown) for word in words]
    with pytest.raises(UsageError, match=f"unrecognized arguments: {unknown}; see"):
        parse(words)


@pytest.mark.parametrize("rest", [[], ["--port", "80", "--by", "unit"]])
def test_a_subcommand_after_an_option_is_told_its_place(rest: list[str]) -> None:
    with pytest.raises(UsageError, match="'who' is a subcommand: write it before"):
        parse(["--socket", "/x", "who", *rest])


def test_a_socket_is_known_to_be_given() -> None:
    assert live(["--socket", "/x"]).origin.socket_given
    for words in ([], ["stats"], ["doctor"], ["top"]):
        command = parse(words)
        origin: Any = getattr(command, "origin", command)
        assert not origin.socket_given and origin.socket == DEFAULT_SOCKET


def test_what_was_said_is_changed_by_nobody() -> None:
    command = live(["--save", "/dev/stdout", "--format", "csv"])
    assert command.save == "-"
    with pytest.raises(FrozenInstanceError):
        command.save = "x.csv"
    with pytest.raises(FrozenInstanceError):
        command.origin.read = []


CONTRACT = {
    "live": "-i -c --duration -n -q -v -t -Q -F --save --format -C -W -r --summary --json --socket"
    " --direct --engine --pid --pname --uid --netns --container",
    "top": "-u -i --pid --pname",
    "who": "--port --proto --host --since --json --socket",
    "stats": "--json --socket",
    "annotate": "-o --socket",
    "report": "-o",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_help_lists_every_option_that_was_promised(name: str) -> None:
    """The command line is a contract: what scripts may rely on does not go away."""
    done = subprocess.run(
        [sys.executable, "-m", "hunter", *([] if name == "live" else [name]), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.stdout))
    assert listed >= set(CONTRACT[name].split())
    assert "example" in done.stdout
    if name == "live":
        assert "-- CMD ARGS" in done.stdout and set(SUBCOMMANDS) <= set(done.stdout.split())


def test_every_help_has_examples() -> None:
    for name in ("live", *SUBCOMMANDS):
        assert "example" in parser_of(name).format_help(), name


def generate(target: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("shtab", reason="shtab is not installed")
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("generate", TREE / "man" / "generate.py")
    module = importlib.util.module_from_spec(there(spec))
    there(there(spec).loader).exec_module(module)
    return module.write(target)


def test_man_pages_and_completions_are_those_of_the_parsers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in generate(tmp_path, monkeypatch):
        committed = TREE / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), "run: COLUMNS=80 python man/generate.py"


def completed(*words: Any, before: str = "") -> Any:
    """What bash offers for the last of `words`."""
    quoted = " ".join(shlex.quote(word) for word in words)
    script = f"""
    source {TREE}/completion/packet-hunter.bash
    {before}
    COMP_WORDS=(packet-hunter {quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    _packet_hunter; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ann"], ["annotate"]),
        (["por"], ["port", "portrange"]),
        (["port", "80", "a"], ["and"]),
        (["-n", "port", "80", "and", "un"], ["unit"]),
        (["top", "po"], ["port", "portrange", "pod"]),
        (["how", "socket_"], ["socket_gone"]),
        (["how", "unn"], ["unnamed"]),
        (["tcp", "-i", "l"], ["lo"]),
        (["--engine", ""], ["auto", "module", "ebpf", "packet"]),
        (["-Q", "o"], ["out"]),
        (["--summ"], ["--summary"]),
        (["who", "--pr"], ["--proto"]),
        (["who", "--proto", "t"], ["tcp"]),
        (["uid", "roo"], ["root"]),
        (["--", "tr"], None),
        (["pname", "x", "or", "no"], ["not"]),
    ],
)
def test_bash_completes_words_and_values(words: list[str], offered: list[str] | None) -> None:
    found = completed(*words)
    if offered is None:
        assert "true" in found and "or" not in found
    else:
        assert found == offered


def test_bash_completes_names_of_processes_but_none_that_a_shell_would_act_on(
    tmp_path: Path,
) -> None:
    names = ("phc-complete", "phc$(touch x)", "phc;ls", "phc `id`")  # nobody else is called so
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, sys.argv[1].encode()); input()"
    processes = []
    for name in names:
        command = [sys.executable, "-c", code, name]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
    try:
        for name, process in zip(names, processes, strict=True):
            comm = Path(f"/proc/{process.pid}/comm")
            until = time.monotonic() + 60
            while comm.read_text() != f"{name[:15]}\n":
                assert time.monotonic() < until
        assert completed("pname", "phc", before=f"cd {tmp_path}") == ["phc-complete"]
        assert list(tmp_path.iterdir()) == []
    finally:
        for process in processes:
            process.communicate(b"\n")


def test_bash_completes_subcommands_and_options() -> None:
    script = f"""
    source {TREE}/completion/packet-hunter.bash
    ask() {{
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_packet_hunter; echo "${{COMPREPLY[@]}}"
    }}
    COMP_WORDS=(packet-hunter who --pr); ask
    COMP_WORDS=(packet-hunter ann); ask
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["--proto", "annotate"], done.stderr


def test_man_explains_each_word_of_the_lines_and_each_name_of_the_configuration() -> None:
    live = (TREE / "man/packet-hunter.1").read_text()
    for how in wire.HOW_NAMES:
        assert how.startswith("how_") or f"\n.B {how}\n" in live, how
    for flag in FLAGS:
        assert re.search(rf"\n\.B .*\b{flag}\b", live), flag
    daemon = (TREE / "man/packet-hunterd.8").read_text().replace("\\-", "-")
    for field in fields(Config):
        assert re.search(rf"\n#?{field.name}: ", daemon), field.name
    for page in (live, daemon):
        assert "\n.SH FILES\n" in page and "\n.SH EXIT STATUS\n" in page
    assert "\n.br\n.B packet\\-hunter\nSUBCOMMAND" in live


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("page", ["packet-hunter.1", "packet-hunterd.8"])
def test_man_pages_format_without_a_warning(page: str) -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", str(TREE / "man" / page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("packet-hunterd --eng", ["--engine"]),
        ("packet-hunterd --engine e", ["ebpf"]),
        ("packet-hunter-export --spool-", ["--spool-size"]),
        ("packet-hunter-otlp --end", ["--endpoint"]),
        ("packet-hunter-collect --ser", ["--server"]),
    ],
)
def test_one_file_completes_the_other_programs_too(line: str, offered: list[str]) -> None:
    script = f"""
    source {TREE}/completion/packet-hunter.bash
    COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    found=$(complete -p "${{COMP_WORDS[0]}}"); found=${{found##*-F }}
    ${{found% *}}; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stderr, done.stdout.split()) == ("", offered)
