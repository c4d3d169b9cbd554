# SPDX-License-Identifier: MIT
from hunter.show.programs import label, programs


def test_many_processes_of_a_program_are_one_row_and_a_few_keep_theirs():
    known = {pid: ("curl", "/bin/curl" if pid % 2 else "") for pid in range(64)}
    known |= {100: ("nginx", "/bin/nginx"), 101: ("nginx", "/bin/nginx")}
    rows = programs(known)
    assert {rows[pid] for pid in range(64)} == {("curl", "/bin/curl", None)}
    assert (rows[100], rows[101]) == (("nginx", "/bin/nginx", 100), ("nginx", "/bin/nginx", 101))


def test_an_unknown_executable_is_not_guessed_where_a_name_has_two():
    known = {1: ("sh", "/bin/dash"), 2: ("sh", "/bin/bash"), 3: ("sh", "")}
    assert programs(known)[3] == ("sh", "", 3)


def test_a_label_is_a_process_or_a_count():
    assert label("curl", {7}) == "curl.7"
    assert label("a\x1b", range(1200)) == "a\\x1b (1,200 processes)"
