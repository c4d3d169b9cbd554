# SPDX-License-Identifier: MIT
"""What packet-hunterd says to mistakes on its command line."""

from __future__ import annotations

import pytest

from daemon.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nonsense"], "--nonsense"),
        (["more"], "more"),
        (["--engine", "none"], "--engine: invalid choice: 'none'"),
        (["--socket"], "--socket: expected one argument"),
        (["--socket", ""], "--socket: an empty word means nothing"),
        (["--config="], "--config: an empty word means nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("packet-hunterd: ")
    assert told in line
    assert line.endswith("; see packet-hunterd --help")
