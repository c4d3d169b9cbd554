# SPDX-License-Identifier: MIT
from __future__ import annotations

import dataclasses
import grp
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.system.config import DEFAULT_GROUP, RELOADABLE, Config, load, parse
from nlproto.errors import UsageError


def test_an_empty_file_means_the_defaults() -> None:
    assert parse("") == Config()
    assert parse("# nothing\n") == Config()


def test_sizes_and_times_have_units() -> None:
    config = parse("queue_size: 16MiB\nhistory_age: 12h\nflush_interval: 250ms\n")
    assert config.queue_size == 16 << 20
    assert config.history_age == 12 * 3600
    assert config.flush_interval == 0.25


def test_off_is_the_word_and_not_a_truth_value() -> None:
    assert parse("cmdline: off\n").cmdline == "off"


def test_null_switches_off_what_can_be_off() -> None:
    assert parse("history: null\nmetrics:\n") == Config()


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("engine: packet\nsockett: /x\n", 2, "sockett"),
        ("\n\nengine: bpf\n", 3, "bpf"),
        ("max_clients: many\n", 1, "many"),
        ("max_clients: 0\n", 1, "max_clients"),
        ("queue_size: 64MiX\n", 1, "64MiX"),
        ("history: relative.db\n", 1, "absolute"),
        ("engine: packet\n\nengine: module\n", 3, "twice"),
        ("metrics: 0.0.0.0:9000\n", 1, "0.0.0.0"),
        ("metrics: 127.0.0.1:0\n", 1, "metrics"),
        ("engine: [packet]\n", 1, "one value"),
        ("socket:\n", 1, "socket"),
        ("max_processes: 4294967295\n", 1, "16 to 1048576"),
        ("\nmax_ports: 99999999\n", 2, "max_ports"),
        ("max_clients: 65537\n", 1, "max_clients"),
        ("max_filters: 65537\n", 1, "max_filters"),
        ("history_flows: 4000000000\n", 1, "history_flows"),
        ("metrics_processes: 100000\n", 1, "metrics_processes"),
        ("queue_size: 17GiB\n", 1, "64KiB to 16GiB"),
        ("client_queue_size: 2GiB\n", 1, "client_queue_size"),
        ("history_size: 17TiB\n", 1, "1MiB to 16TiB"),
        ("history_size: 1\n", 1, "1MiB to 16TiB"),
        (f"history_size: {'9' * 400}\n", 1, "history_size"),
        (f"max_processes: {'9' * 5000}\n", 1, "max_processes"),
        ("history_age: 40000d\n", 1, "history_age"),
        ("flush_interval: 2h\n", 1, "flush_interval"),
        ("engine: packet\ngroup: no-such-group-here\n", 2, "groupadd no-such-group-here"),
        ("- engine\n", 1, "name: value"),
        ('engine: "a\\nb"\n', 1, "one of auto, module, ebpf, packet"),
        ("max_clients: 1.5\n", 1, "a number from 1 to 16384"),
        ("metrics: localhost:65536\n", 1, "PORT is 1 to 65535"),
        ("flush_interval: 30parsecs\n", 1, "30s"),
        ('socket: "/run/a\\0b"\n', 1, "an absolute path"),
        ('history: "/var/\\ud800"\n', 1, "an absolute path"),
        ('metrics: "/run/a\\0b"\n', 1, "an absolute path"),
        ('group: "root\\n"\n', 1, "a group name"),
        ("engine: packet\n  bad: indent\n", 2, "not allowed"),
        ("a: 'unclosed\n", 2, "end of stream"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, word: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text, "daemon.yaml")
    assert str(raised.value).startswith(f"daemon.yaml:{line}: ")
    assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_the_default_group_need_not_be_there_and_any_other_has_to() -> None:
    assert parse(f"group: {DEFAULT_GROUP}\n") == Config()
    assert parse(f"group: {grp.getgrgid(0).gr_name}\n").group == grp.getgrgid(0).gr_name


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(str(tmp_path / "none.yaml"))


def test_a_file_that_is_not_utf8_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "daemon.yaml"
    path.write_bytes(b"engine: \xff\n")
    with pytest.raises(UsageError, match="UTF-8"):
        load(str(path))


def test_every_reloadable_name_is_a_name() -> None:
    assert {field.name for field in dataclasses.fields(Config)} >= RELOADABLE


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_one_line_of_error(text: str) -> None:
    try:
        parse(text)
    except UsageError as error:
        assert str(error).startswith("configuration:")
