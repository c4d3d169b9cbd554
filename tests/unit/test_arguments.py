# SPDX-License-Identifier: MIT
"""The command line: words, options and the filter they amount to; pages made from the parsers."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hunter.arguments import SUBCOMMANDS, filter_of, live_parser, parse, parser_of
from nlproto import UsageError
from nlproto.filter import FilterError

TREE = Path(__file__).parents[2]


def filter_text(*words):
    return str(filter_of(parse(words).options))


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
def test_words_and_options_make_one_filter(words, text):
    assert filter_text(*words) == text


def test_an_interface_counts_in_its_own_network_namespace_only():
    here = os.stat("/proc/self/ns/net").st_ino
    index = socket.if_nametoindex("lo")
    assert filter_text("-i", "lo") == f"netns {here} and ifindex {index}"


def test_a_first_word_is_a_subcommand_and_anything_else_a_filter():
    assert parse(["who", "--port", "http"]).options.port == 80
    assert parse(["tcp"]).name == "live"
    with pytest.raises(UsageError, match="before the options"):
        parse(["-n", "top"])
    with pytest.raises(FilterError, match="pname nginx"):
        filter_text("nginx")


def test_what_follows_two_dashes_is_the_command():
    command = parse(["tcp", "--", "curl", "-v", "--json"])
    assert command.argv == ("curl", "-v", "--json") and not command.options.json


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5", 1.5), ("500ms", 0.5), ("5m", 300), ("2h", 7200)]
)
def test_times_have_units(text, seconds):
    assert parse(["--duration", text]).options.duration == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1", 10**6), ("4k", 4096), ("2M", 2 << 20), ("1g", 1 << 30)]
)
def test_sizes_are_tcpdumps_millions_or_powers_of_two(text, size):
    assert parse(["--save", "x.csv", "-C", text]).options.rotate == size


@pytest.mark.parametrize(
    "words",
    [
        ["-W", "3", "--save", "x.csv"],
        ["-C", "1"],
        ["--format", "csv"],
        ["--save", "-", "--json"],
        ["-r", "x.csv", "--direct"],
        ["--"],
        ["who"],
    ],
)
def test_options_that_make_no_sense_together_are_refused(words):
    with pytest.raises(UsageError):
        parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "-1"],
        ["--duration", "soon"],
        ["--engine", "x"],
        ["-Q", "up"],
        ["who", "8080"],
        ["top", "-d", "0"],
    ],
)
def test_bad_values_are_one_line_that_names_the_help(words):
    with pytest.raises(UsageError, match=r"^[^\n]*; see packet-hunter.* --help$"):
        parse(words)


def test_the_letters_that_tcpdump_has_too_mean_the_same():
    """man tcpdump: what each of these is for."""
    letters = {option for action in live_parser()._actions for option in action.option_strings}
    short = {letter for letter in letters if re.fullmatch("-[A-Za-z]", letter)}
    assert short == {f"-{letter}" for letter in "hVFiQcnqvtwCWrB"}


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
def test_help_lists_every_option_that_was_promised(name):
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


def test_every_help_has_examples():
    for name in ("live", *SUBCOMMANDS):
        assert "example" in parser_of(name).format_help(), name


def generate(target, monkeypatch):
    pytest.importorskip("shtab", reason="shtab is not installed")
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("generate", TREE / "man" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(target)


def test_man_pages_and_completions_are_those_of_the_parsers(tmp_path, monkeypatch):
    for path in generate(tmp_path, monkeypatch):
        committed = TREE / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), "run: COLUMNS=80 python man/generate.py"


def test_bash_completes_subcommands_and_options():
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
