# SPDX-License-Identifier: MIT
"""The filter language: what each word selects, how words join, what an error says."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto import UsageError
from nlproto.filters.mistakes import FilterError
from nlproto.filters.parse import parse
from nlproto.filters.words import WORDS, quote
from nlproto.host.procfs import Parent
from nlproto.records import wire
from waiting import noting, stand_in


def record(**fields: Any) -> Any:
    values = {
        "src": "10.0.0.1",
        "dst": "192.168.7.9",
        "sport": 40000,
        "dport": 80,
        "proto": socket.IPPROTO_TCP,
        "dir": wire.lib.SNIFFER_DIR_OUT,
        "how": wire.lib.SNIFFER_HOW_CONTEXT,
        "tgid": 100,
        "start_ns": 1,
        "uid": 1000,
        "len": 60,
        "netns": 4026531840,
        "ifindex": 1,
        "comm": b"curl",
    } | fields
    one = np.zeros(1, wire.RECORD)[0]
    for end, word in (("src", "saddr"), ("dst", "daddr")):
        address = ipaddress.ip_address(values.pop(end))
        one[word][: len(address.packed)] = list(address.packed)
        one["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for name, value in values.items():
        one[name] = value
    return one


RECORDS = {
    "curl": record(),
    "reply": record(
        src="192.168.7.9", dst="10.0.0.1", sport=80, dport=40000, dir=wire.lib.SNIFFER_DIR_IN
    ),
    "dns": record(
        dport=53, proto=socket.IPPROTO_UDP, tgid=200, uid=0, len=90, comm=b"systemd-resolve"
    ),
    "six": record(
        src="fe80::1", dst="2001:db8::5", dport=443, tgid=300, netns=4026532005, ifindex=3
    ),
    "routed": record(
        how=wire.lib.SNIFFER_HOW_FORWARDED, dir=wire.lib.SNIFFER_DIR_FWD, tgid=0, uid=0, comm=b""
    ),
}
BATCH = np.array(list(RECORDS.values()))


def chosen(text: Any, details: Any = None) -> set[Any]:
    mask = parse(text).mask(BATCH, details)
    assert mask.dtype == bool and mask.shape == (len(BATCH),)
    return {name for name, taken in zip(RECORDS, mask, strict=True) if taken}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "curl reply dns six routed"),
        ("tcp", "curl reply six routed"),
        ("udp", "dns"),
        ("ip6", "six"),
        ("ip", "curl reply dns routed"),
        ("port 80", "curl reply routed"),
        ("port http", "curl reply routed"),
        ("src port 80", "reply"),
        ("dst port 80", "curl routed"),
        ("src and dst port 80", ""),
        ("src or dst port 80", "curl reply routed"),
        ("udp port 53", "dns"),
        ("tcp port 53", ""),
        ("port 53 or 443", "dns six"),
        ("tcp dst port 53 or 443 or 80", "curl six routed"),
        ("portrange 50-443", "curl reply dns six routed"),
        ("dst portrange 50-60", "dns"),
        ("host 10.0.0.1", "curl reply dns routed"),
        ("src 10.0.0.1", "curl dns routed"),
        ("dst host 10.0.0.1", "reply"),
        ("host fe80::1", "six"),
        ("net 192.168.0.0/16", "curl reply dns routed"),
        ("net 192.168", "curl reply dns routed"),
        ("src net 192", "reply"),
        ("net 192.168.0.0 mask 255.255.0.0", "curl reply dns routed"),
        ("net 2001:db8::/32", "six"),
        ("net 0.0.0.0/0", "curl reply dns routed"),
        ("inbound", "reply"),
        ("outbound", "curl dns six"),
        ("pid 100", "curl reply"),
        ("pid 100 or 200", "curl reply dns"),
        ("pid 0", ""),
        ("pname curl", "curl reply six"),
        ("pname systemd-resolved", "dns"),
        ("pname systemd-resolve", "dns"),
        ("pname systemd-resolvers-other", "dns"),
        ('pname "c*l"', "curl reply six"),
        ("pname cu", ""),
        ("uid 0", "dns"),
        ("uid root", "dns"),
        ("netns 4026532005", "six"),
        ("ifindex 3", "six"),
        ("how forwarded", "routed"),
        ("how unnamed", "routed"),
        ("how context", "curl reply dns six"),
        ("how named", "curl reply dns six"),
        ("less 59", ""),
        ("less 60", "curl reply routed six"),
        ("greater 90", "dns"),
        ("greater 91", ""),
        ("not tcp", "dns"),
        ("! tcp || ip6", "dns six"),
        ("not (tcp or udp)", ""),
        ("not port 80 and tcp", "six"),
        # as in pcap-filter, equal precedence from the left: (udp or tcp) and ip6
        ("udp or tcp and ip6", "six"),
        ("udp or (tcp and ip6)", "dns six"),
        ("tcp&&port 443", "six"),
    ],
)
def test_words_select(text: str, names: str) -> None:
    assert chosen(text) == set(names.split())


@dataclass
class Known:
    exe: str = ""
    cmdline: str = ""
    container: str = ""
    container_name: str = ""
    pod: str = ""
    unit: str = ""
    parents: tuple[Parent, ...] = ()


def test_pname_fits_the_executable_when_the_process_renamed_itself() -> None:
    details = {(200, 1): Known(exe="/usr/lib/systemd/systemd-resolved")}

    class Details:
        def get(self, tgid: int, start_ns: int) -> Any:
            return details.get((tgid, start_ns))

    assert chosen("pname systemd-resolved", Details()) == {"dns"}
    assert chosen("pname systemd-resolvers-other", Details()) == set()


@pytest.mark.parametrize(
    ("container", "words", "fits"),
    [
        ("docker:0123456789ab", "0123456789ab", True),
        ("docker:0123456789ab", "0123456789abcdef0123", True),
        ("docker:0123456789ab", "docker:0123456789ab", True),
        ("docker:0123456789ab", "docker:*", True),
        ("docker:0123456789ab", "0123456789ac", False),
        ("docker:0123456789ab", "0123*", True),
        ("docker:0123456789ab", "0123", True),
        ("docker:0123456789ab", "docker:0123", True),
        ("docker:0123456789ab", "podman:0123", False),
        ("docker:0123456789ab", "123", False),
        ("podman:0123456789ab", "0", True),
        ("docker:0123456789ab", "doc", False),
        ("lxc:web", "web", True),
        ("lxc:web", "lxc:web", True),
        ("lxc:web", "we", False),
        ("lxc:ab", "abcdef012345", False),
        ("", "web", False),
    ],
)
def test_container_fits_by_name_and_by_id(container: str, words: str, fits: bool) -> None:
    class Details:
        def get(self, tgid: int, start_ns: int) -> Any:
            return Known(container=container) if tgid == 300 else None

    assert chosen(f'container "{words}"', Details()) == ({"six"} if fits else set())
    assert chosen(f'container "{words}"') == set()


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("container web", True),
        ("container docker:web", True),
        ("container podman:web", False),
        ('container "w*"', True),
        ("container we", False),
        ("pod default/web-0", True),
        ("pod web-0", True),
        ('pod "default/*"', True),
        ("pod default", False),
        ("pod other/web-0", False),
        ("parent sshd", True),
        ("parent 800", True),
        ("parent bash", True),
        ("parent curl", False),
        ("parent 80", False),
        ("exe /usr/bin/curl", True),
        ("exe curl", True),
        ('exe "/usr/*"', True),
        ("exe bin/curl", False),
        ('cmdline "-H secret"', True),
        ('cmdline "*example.org"', True),
        ('cmdline "example.com"', False),
        ("src host 127.0.0.1 and pod web-0 or unit nothing", False),
    ],
)
def test_words_for_what_is_known_of_a_process(words: str, fits: bool) -> None:
    class Details:
        def get(self, tgid: int, start_ns: int) -> Any:
            return known if tgid == 300 else Known()

    known = Known(
        exe="/usr/bin/curl",
        cmdline="curl -H secret https://example.org",
        container="docker:0123456789ab",
        container_name="web",
        pod="default/web-0",
        parents=(Parent(812, "bash"), Parent(800, "sshd")),
    )
    assert chosen(words, Details()) == ({"six"} if fits else set())
    assert chosen(words) == set()


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("nginx.service", True),
        ("nginx", True),
        ("ngin*", True),
        ("ngin", False),
        ("service", False),
        ("other.service", False),
    ],
)
def test_unit_fits_as_systemctl_takes_it(words: str, fits: bool) -> None:
    class Details:
        def get(self, tgid: int, start_ns: int) -> Any:
            return Known(unit="nginx.service") if tgid == 300 else None

    assert chosen(f"unit {words}", Details()) == ({"six"} if fits else set())
    assert str(parse(f'unit "{words}"')) == f"unit {words}"


@pytest.mark.parametrize(
    ("text", "culprit", "words"),
    [
        ("icmp", "icmp", "only TCP and UDP are recorded"),
        ("not arp", "arp", "only TCP and UDP are recorded"),
        ("port 80 or icmp6", "icmp6", "only TCP and UDP are recorded"),
        ("tcp and (port 80 or sctp)", "sctp", "only TCP and UDP are recorded"),
        ("icmp and", "icmp", "only TCP and UDP are recorded"),
        ("proto udp", "proto", "write tcp, udp"),
        (r"ip proto 17", "proto", "write tcp, udp"),
        ("ether host 1:2:3:4:5:6", "ether", "not supported"),
        ("len > 100", "len", "'less N'"),
        ("tcp[tcpflags] & tcp-syn != 0", "tcp[tcpflags]", "bytes of a packet"),
        ("port 80 and tcp[13]&2 != 0", "tcp[13]", "bytes of a packet"),
        ("(ip[6:2] & 0x1fff) = 0", "ip[6:2]", "bytes of a packet"),
    ],
)
def test_words_of_pcap_filter_that_are_none_here_are_named(
    text: str, culprit: str, words: str
) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    error = caught.value
    assert f"pcap-filter's {culprit!r} is not supported" in str(error) and words in str(error)
    assert text[error.start : error.end] == culprit


@pytest.mark.parametrize("text", ["pname icmp", "container len", "unit arp", 'pname "tcp[1]"'])
def test_a_value_may_be_a_word_of_pcap_filter(text: str) -> None:
    assert str(parse(text)).split()[0] == text.split()[0]


def test_what_is_quoted_is_no_word_of_pcap_filter() -> None:
    with pytest.raises(FilterError, match="'or' is missing"):
        parse('pname "tcp[1]" port 80')


def test_named_is_a_value_of_how() -> None:
    with pytest.raises(FilterError, match="write 'how unnamed'"):
        parse("unnamed and tcp")


@pytest.mark.parametrize(
    ("text", "culprit", "words"),
    [
        ("prot 80", "prot", "did you mean 'port'?"),
        ("tcp adn udp", "adn", "did you mean 'and'?"),
        ("port", "port", "needs a value"),
        ("tcp and", "and", "needs something after it"),
        ("(tcp", "(tcp", "unclosed"),
        ("tcp)", ")", "without '('"),
        ("()", ")", "nothing before ')'"),
        ("nginx", "nginx", "write 'pname nginx'"),
        ("80", "80", "port 80"),
        ("1.2.3.4", "1.2.3.4", "host 1.2.3.4"),
        ("pid nginx", "nginx", "pname nginx"),
        ("port 99999", "99999", "above 65535"),
        ("portrange 9-5", "9-5", "5-9"),
        ("portrange 9", "9", "1000-2000"),
        ("how sockt", "sockt", "did you mean 'socket'?"),
        ("host 1.2.3.4/8", "1.2.3.4/8", "net 1.2.3.4/8"),
        ("host 1.2.3.400", "1.2.3.400", "no address"),
        ("net 10.0.0.1/8", "10.0.0.1/8", "host bits"),
        ("uid nobody-of-that-name", "nobody-of-that-name", "no user"),
        ("netns nowhere", "nowhere", "no network namespace"),
        ("tcp udp", "udp", "'and' or 'or' is missing"),
        ('pname "abc', '"abc', "unclosed"),
        ("port tcp", "tcp", "needs a value"),
        ("tcp and & udp", "&", "means nothing"),
    ],
)
def test_an_error_points_at_the_word_and_says_what_to_do(
    text: str, culprit: str, words: str
) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    error = caught.value
    assert text[error.start : error.end] == culprit
    assert words in str(error)
    assert "\n" not in str(error)
    shown, carets = error.pointer().split("\n")
    assert carets.strip() == "^" * len(culprit)
    assert shown[carets.index("^") :].startswith(culprit)
    assert isinstance(error, UsageError)


def test_without_resolve_names_are_refused() -> None:
    for text in ("host localhost", "port http", "uid root", "netns blue"):
        with pytest.raises(FilterError):
            parse(text, resolve=False)


def test_too_deep_and_too_long_are_refused_and_long_chains_are_not() -> None:
    with pytest.raises(FilterError, match="within each other"):
        parse("(" * 60 + "tcp" + ")" * 60)
    with pytest.raises(FilterError, match="within each other"):
        parse("not " * 60 + "tcp")
    with pytest.raises(FilterError, match="longer than"):
        parse("tcp and " * 1000 + "tcp")
    assert parse("tcp and " * 500 + "tcp").mask(BATCH).sum() == 4


def test_two_filters_are_joined_by_and_as_wholes() -> None:
    both = parse("port 80 or port 53") & parse("udp or inbound")
    assert parse(str(both)) == both
    assert list(both.mask(BATCH)) == [False, True, True, False, False]
    assert parse("") & parse("tcp") == parse("tcp")


@given(st.text(max_size=40))
def test_any_text_parses_or_raises_a_filter_error(text: str) -> None:
    try:
        parse(text, resolve=False).mask(BATCH)
    except FilterError as error:
        assert "\n" not in str(error).replace(text, "")


@given(st.text(min_size=1, max_size=20))
def test_any_name_can_be_quoted(name: str) -> None:
    parsed = parse(f"pname {quote(name)}")
    assert stand_in(parsed.root).name == name


leaves = st.sampled_from(["tcp", "udp", "port 80", "src 10.0.0.1", "inbound", "pid 100", "uid 0"])
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
    ),
    max_leaves=8,
)


@given(trees)
def test_the_text_form_means_the_same(text: Any) -> None:
    first = parse(text)
    again = parse(str(first), resolve=False)
    assert str(again) == str(first)
    assert (again.mask(BATCH) == first.mask(BATCH)).all()


@given(trees, trees)
def test_and_or_not_are_those_of_sets(one: Any, other: Any) -> None:
    everything = set(RECORDS)
    assert chosen(f"({one}) and ({other})") == chosen(one) & chosen(other)
    assert chosen(f"({one}) or ({other})") == chosen(one) | chosen(other)
    assert chosen(f"not ({one})") == everything - chosen(one)


def test_every_word_can_stand_as_a_quoted_value() -> None:
    for word in WORDS:
        assert stand_in(parse(f'pname "{word}"').root).name == word


class Counted:
    """Details that tell how often they were asked."""

    def __init__(self) -> None:
        self.asked = 0

    def get(self, tgid: int, start_ns: int) -> Known:
        self.asked += 1
        return Known(exe=f"/bin/program{tgid}", container="docker:4f1c0d2e9a3b")


def test_owner_words_look_at_each_process_once_however_many_words_and_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = np.repeat(BATCH, 500)
    text = " or ".join(f'pname "*{n}x*" or container "y{n}*"' for n in range(40))
    details = Counted()
    filter = parse(text)
    assert not filter.mask(records, details).any()
    assert details.asked == 3  # processes 100, 200 and 300; 300 is named curl as 100 is


def test_a_word_is_held_against_each_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(
        "nlproto.filters.parse.matcher", lambda name: noting(looked, lambda other: False)
    )
    records = np.repeat(BATCH, 500)
    parse("pname nobody").mask(records)
    assert sorted(looked) == ["curl", "curl", "systemd-resolve"]


def test_what_a_filter_costs_has_an_end() -> None:
    assert parse(" or ".join(f"pname a{n}" for n in range(128))).cost == 512
    with pytest.raises(FilterError, match="516 tests .a name counts as 4.; 512 at most"):
        parse(" or ".join(f"pname a{n}" for n in range(129)))
    with pytest.raises(FilterError, match="513 tests"):
        parse("tcp or " * 512 + "udp")


@pytest.mark.parametrize("word", ["pname", "container"])
def test_a_long_pattern_is_refused_before_it_is_translated(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fnmatch.translate", lambda name: pytest.fail("translated"))
    with pytest.raises(FilterError, match="at most 256 characters"):
        parse(f'{word} "{"[" * 4000}"')


def test_patterns_of_strangers_stay_in_no_cache() -> None:
    import fnmatch

    before = stand_in(fnmatch)._compile_pattern.cache_info().currsize
    for number in range(50):
        parse(f'pname "*{number}*"').mask(BATCH)
    assert stand_in(fnmatch)._compile_pattern.cache_info().currsize == before


@pytest.mark.parametrize("word", ["port", "uid", "host"])
@pytest.mark.parametrize("name", ["\udcff", "a\0b"])
def test_names_that_no_library_takes_are_refused(word: str, name: str) -> None:
    with pytest.raises(FilterError):
        parse(f"{word} '{name}'")
