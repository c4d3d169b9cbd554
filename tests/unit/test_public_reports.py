# SPDX-License-Identifier: MIT
"""Situations from public reports about other tools: each has a test, and that test is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent

REPORTS = {
    "one tuple in two namespaces (bandwhich #196, osquery #3016)": [
        "host/test_joins.py::test_a_flow_that_two_namespaces_had_is_never_the_others",
        "host/test_joins.py::test_no_view_mixes_two_namespaces_with_one_tuple",
        "host/test_who.py::test_the_same_port_in_two_namespaces_is_told_apart",
        "host/test_connections.py::"
        "test_what_is_lost_counts_for_who_lost_it_and_for_nobody_with_the_same_ends",
        "unit/test_past_owners.py::test_namespaces_are_kept_apart",
        "unit/test_lines.py::test_the_summary_counts_equal_addresses_of_two_namespaces_apart",
        "unit/test_report.py::test_equal_addresses_of_two_namespaces_are_two_far_ends",
        "unit/test_rates.py::test_equal_addresses_of_two_namespaces_are_two_far_ends",
        "unit/test_fleet_ask.py::test_addresses_that_many_machines_have_join_on_their_own_machine",
    ],
    "a capture cut in its last packet (nDPI #1678, libpcap #62)": [
        "unit/test_hostile_traces.py::test_a_cut_trace_is_read_to_its_last_whole_packet",
        "host/test_hunter_captures.py::"
        "test_annotate_reads_pipes_gzip_and_cut_captures_and_writes_into_pipes",
    ],
    "many connections to a high port (nethogs #125, tetragon #3493)": [
        "host/test_joins.py::test_many_connections_to_a_port_are_named_however_high_it_is",
        "unit/test_past_owners.py::test_an_answer_that_was_cut_is_asked_for_again_and_never_passed_over",
    ],
    "a capture from a pipe and into a pipe (scapy #4405, dpkt #129, p0f #13)": [
        "host/test_hunter_captures.py::"
        "test_annotate_reads_pipes_gzip_and_cut_captures_and_writes_into_pipes",
    ],
    "VLAN, PPP, PPPoE, GRE, MPLS, NFLOG, SLL (libpcap #164, #717, #1105)": [
        "unit/test_hostile_traces.py::test_every_kind_of_capture_is_understood",
        "unit/test_hostile_traces.py::test_what_is_not_understood_has_a_name",
        "host/test_hunter_captures.py::test_annotate_tells_by_kind_what_it_did_not_look_into",
    ],
    "compressed captures (gopacket #213, tcpdump #254, sngrep #198)": [
        "unit/test_compressed_files.py::test_what_the_tools_write_is_read",
    ],
    "byte orders, units of time, unknown blocks (pcapng-decoder #2, scapy #2894)": [
        "unit/test_hostile_traces.py::test_pcap_of_each_kind_has_its_times_and_packets",
        "unit/test_hostile_traces.py::test_pcapng_interfaces_tell_the_unit_and_offset_of_time",
    ],
    "simple and obsolete packet blocks": [
        "host/test_hunter_captures.py::"
        "test_annotate_marks_obsolete_blocks_and_counts_those_without_a_place",
    ],
    "headers that lie about lengths (tcpdump #965, #136)": [
        "unit/test_hostile_traces.py::test_a_packet_longer_than_its_block_is_an_error",
    ],
    "traffic of a process that ended (nethogs #277)": [
        "host/test_who.py::test_a_closed_connection_is_nobodys_now",
    ],
    "connections older than the start; the far end (rustnet PR 575, nethogs #229)": [
        "host/test_who.py::test_host_is_the_far_end",
        "host/test_daemon_answers.py::"
        "test_the_port_map_knows_connections_that_were_idle_since_before_it_began",
    ],
    "a published port, masquerade, hairpin, a proxy (nethogs #2, rustnet PR 376)": [
        "host/test_nat.py::test_who_names_the_process_behind_a_published_port",
        "host/test_nat.py::test_masquerade_is_seen_from_both_sides",
        "host/test_nat.py::test_a_container_that_asks_itself_by_its_published_port",
        "host/test_nat.py::test_who_shows_the_process_behind_a_proxy_of_the_runtime",
        "host/test_nat.py::test_a_process_of_the_host_that_asks_its_own_published_port",
        "host/test_nat.py::test_what_is_translated_twice_has_the_last_ends",
        "host/test_nat.py::test_a_capture_of_the_uplink_names_the_process_in_the_container",
        "host/test_nat_again.py::test_a_port_that_comes_back_at_once",
        "vm/test_overheard.py::test_who_names_the_process_behind_a_published_port",
    ],
    "the reason for packets that pass through": [
        "host/test_nat.py::test_a_proxy_of_the_runtime_has_not_what_is_translated",
        "host/test_engine_packet_forwarding.py::test_a_forwarded_packet_is_one_record_without_owner",
    ],
    "a scan by a raw socket (opensnitch #1160)": [
        "host/test_reported.py::test_a_scan_by_a_raw_socket_is_nobodys_and_a_closed_port_says_so",
    ],
    "the arguments of a second run (picosnitch #32)": [
        "host/test_reported.py::test_a_second_run_has_its_own_arguments",
    ],
    "capabilities and no root (nethogs PR 233, bandwhich #131, earlyoom #161)": [
        "host/test_reported.py::test_capabilities_alone_are_enough_for_the_names_of_others",
    ],
    "other protocols (opensnitch #714, tracee #1359)": [
        "host/test_engine_packet_account.py::test_other_protocols_are_seen_and_skipped",
    ],
    "an interface that comes back (nethogs #163, bandwhich #136)": [
        "host/test_hunter_interface.py::test_an_interface_that_comes_back_is_followed",
    ],
    "a saved file has the figures of the live run": [
        "unit/test_saved_captures.py::"
        "test_each_format_gives_back_every_column_and_the_figures_of_the_live_run",
        "host/test_hunter_captures.py::test_a_file_gives_the_figures_of_the_live_run",
    ],
    "hostile names of processes (psutil #675, #1029, nethogs #28)": [
        "host/test_hunter.py::test_a_hostile_process_name_is_harmless",
        "unit/test_saved_captures.py::test_no_name_in_a_comment_passes_for_another_word",
    ],
    "a process called 'quoted in CSV": [
        "unit/test_saved_captures.py::"
        "test_a_cell_gives_its_name_back_and_no_spreadsheet_computes_it",
    ],
    "very long command lines (nethogs #23, htop #482)": [
        "unit/test_procfs.py::test_what_a_user_chose_is_kept_up_to_4096_bytes_and_marked_as_cut",
        "unit/test_answers.py::test_an_answer_over_a_frame_is_cut_not_refused",
    ],
    "50,000 sockets and no traffic (rustnet #12, nethogs #189)": [
        "unit/test_watcher.py::test_looks_take_a_fifth_of_a_percent_of_a_core_while_nobody_asks",
        "host/test_kernel_sockets.py::test_a_look_asks_only_about_what_is_new",
        "unit/test_holders.py::test_who_has_many_sockets_is_left_alone_while_others_talk",
    ],
    "a question in the first second (rustnet PR 575)": [
        "host/test_who.py::test_a_daemon_that_has_just_started_is_not_asked_in_vain",
    ],
    "broken pipes, full disks, closed descriptors (bandwhich PR 429, fd #24)": [
        "host/test_hunter_endings.py::test_a_closed_pipe_ends_it_quietly_with_0",
        "unit/test_save.py::test_a_full_disk_keeps_what_fits_whole",
        "unit/test_hostile_files.py::test_a_closed_output_is_one_line_and_no_file_takes_its_place",
        "unit/test_hostile_files.py::test_words_never_go_where_data_goes",
    ],
    "a file that logrotate moved away (candump #267, goflow2 #3)": [
        "unit/test_saved_captures.py::test_a_file_that_was_moved_away_gets_a_successor",
    ],
    "words of pcap-filter (tcpdump #299)": [
        "unit/test_filter.py::test_words_of_pcap_filter_that_are_none_here_are_named",
    ],
    "container, pod, parent, command line in files (ptcpdump #56, tetragon #2639)": [
        "unit/test_saved_captures.py::"
        "test_each_format_gives_back_every_column_and_the_figures_of_the_live_run",
        "unit/test_containers.py::test_each_runtime_tells_in_its_own_file",
    ],
    "few descriptors and many namespaces": [
        "host/test_namespaces.py::test_few_descriptors_are_enough_for_its_own_namespace",
        "unit/test_descriptors.py::test_network_namespaces_leave_descriptors_for_clients",
    ],
}


@pytest.mark.parametrize("wanted", REPORTS.values(), ids=REPORTS)
def test_each_report_has_a_test(wanted: Any) -> None:
    """Of `file::` alone any test will do."""
    for one in wanted:
        file, _, name = one.partition("::")
        assert re.search(rf"^def {name or 'test_'}{'[(]' if name else ''}",
                         (TESTS / file).read_text(), re.M), one  # fmt: skip
