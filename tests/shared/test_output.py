"""`fl_shared.cli.output`: the same table for eyes and for `awk`, and signs of life on standard error alone."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

DIGEST = "sha256:" + "ab" * 32
SITE = "hospital-of-a-long-name-in-the-north-001"
WHY = "the noise is below the policy's least, and the budget has nothing left for this study in this year"
TABLE = f"""
from fl_shared.cli.output import table
table(["site", "rounds", "digest", "why"], [[{SITE!r}, "12", {DIGEST!r}, {WHY!r}], ["b", "3", "-", "two\\nreasons"]],
      title="Plan", right=["rounds"])
"""
SLOW = """
import sys, time
from fl_shared.cli.output import working
with working("loading the model", quiet="quiet" in sys.argv, json="json" in sys.argv) as say:
    time.sleep(2.6)
    say("evaluating on the hold-out", 30, 120)
    time.sleep(1.6)
print('{"answer": 1}')
"""


def in_pipe(source: str, *words: str, **environment: str) -> tuple[str, str]:
    """Output and errors of a script, both through pipes."""
    done = subprocess.run(
        [sys.executable, "-c", source, *words], env=os.environ | environment, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def on_terminal(source: str, *words: str, width: int = 120, **environment: str) -> str:
    """What a script writes to a pseudo-terminal of `width` columns, output and errors together."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", source, *words], env=kept | {"TERM": "xterm-256color"} | environment,
        stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    read = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the last writer has gone
            break
        if not piece:
            break
        read += piece
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return read.decode()


def test_a_table_in_a_pipe_is_plain_columns_of_full_width() -> None:
    """One line a row whatever COLUMNS says: nothing folded, cut to an ellipsis, drawn or coloured."""
    out, _ = in_pipe(TABLE, COLUMNS="40", FORCE_COLOR="1")
    lines = out.splitlines()
    assert len(lines) == 4
    assert (lines[0], lines[1].split()) == ("Plan", ["site", "rounds", "digest", "why"])
    assert lines[2].split()[:3] == [SITE, "12", DIGEST]
    assert lines[2].endswith(WHY)
    assert lines[3].split(maxsplit=3) == ["b", "3", "-", "two; reasons"]
    starts = {re.search(r"\S+", line[lines[1].index("why") :]).start() for line in lines[1:]}  # type: ignore[union-attr]
    assert starts == {0}
    assert not re.search("[…│─┃━\x1b]", out)


@pytest.mark.parametrize("width", [170, 240])
def test_a_table_on_a_terminal_folds_words_and_cuts_none(width: int) -> None:
    """Lines keep to the terminal's width, and each id, digest and name is in one piece."""
    out = on_terminal(TABLE, width=width).replace("\r\n", "\n")
    assert all(len(line) <= width for line in out.splitlines())
    assert len(out.splitlines()) > 4
    for word in (SITE, DIGEST, *WHY.split()):
        assert word in out


@pytest.mark.parametrize("width", [20, 80])
def test_a_terminal_that_is_too_narrow_loses_nothing(width: int) -> None:
    """Where the words alone are wider than the terminal, the terminal breaks the lines."""
    out = on_terminal(TABLE, width=width)
    assert SITE in out
    assert DIGEST in out
    assert "…" not in out


def test_columns_sets_the_width_on_a_terminal() -> None:
    """COLUMNS goes before what the terminal says, as for `ls`."""
    assert on_terminal(TABLE, width=80, COLUMNS="400").count("\n") == 5
    assert on_terminal(TABLE, width=400, COLUMNS="170").count("\n") > 5


def test_a_table_steers_no_terminal() -> None:
    """Escape sequences from a network are shown; so is a table without rows."""
    out, _ = in_pipe('from fl_shared.cli.output import table; table(["a"], [["x\\x1b[2J\\ty"]]); table(["b"], [])')
    assert [line.split() for line in out.splitlines()] == [["a"], ["x\\x1b[2J", "y"], ["b"]]


def test_progress_in_a_pipe_is_a_line_for_each_thing() -> None:
    """Past two seconds a line on standard error says what is being done; standard output holds the data alone."""
    out, err = in_pipe(SLOW)
    assert out == '{"answer": 1}\n'
    lines = err.splitlines()
    assert re.fullmatch(r"loading the model \(\d+ s\)", lines[0])
    assert re.fullmatch(r"evaluating on the hold-out 25 % \(\d+ s\)", lines[-1])
    assert "\x1b" not in err


@pytest.mark.parametrize("word", ["quiet", "json"])
def test_progress_in_a_pipe_can_be_off(word: str) -> None:
    """--quiet says nothing, nor does --json, whose reader wants one JSON object on standard error at most."""
    assert in_pipe(SLOW, word) == ('{"answer": 1}\n', "")


def test_what_is_quick_says_nothing() -> None:
    """No line before the first two seconds."""
    source = 'from fl_shared.cli.output import working\nwith working("x"):\n    pass\n'
    assert in_pipe(source) == ("", "")
    assert on_terminal(source) == ""


def test_progress_on_a_terminal_is_one_line_that_is_gone_at_the_end() -> None:
    """The line changes in place, is erased, and the data follows on a line of its own."""
    out = on_terminal(SLOW, "json")  # a person watches: --json keeps the line
    assert "loading the model" in out
    assert "evaluating on the hold-out 25 %" in out
    *_, last = out.split("\x1b[2K")
    assert last == '{"answer": 1}\r\n'
    assert "loading" not in on_terminal(SLOW, "quiet")


def test_no_color_takes_the_colours_away() -> None:
    """With NO_COLOR no sequence that sets a colour or a weight (SGR) is written; a dumb terminal gets plain lines."""
    assert not re.search(r"\x1b\[[0-9;]*m", on_terminal(SLOW, NO_COLOR="1"))
    plain = on_terminal(SLOW, TERM="dumb")
    assert "\x1b" not in plain
    assert "loading the model (" in plain


def test_output_into_a_file_stays_clean_while_a_terminal_shows_progress(tmp_path: Path) -> None:
    """Standard output is a file and standard error a terminal: the file holds the data alone."""
    wrapped = f"""
import os, sys
os.dup2(os.open({str(tmp_path / "out")!r}, os.O_CREAT | os.O_WRONLY), 1)
{SLOW.replace("time.sleep(1.6)", "time.sleep(0.5); print('first', flush=True); time.sleep(1)")}
"""
    shown = on_terminal(wrapped)
    assert (tmp_path / "out").read_text() == 'first\n{"answer": 1}\n'
    assert "evaluating" in shown


def test_a_reader_of_progress_that_leaves_breaks_nothing() -> None:
    """Standard error is a pipe whose reader has gone: the work is done all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=writing, text=True, timeout=60, check=False
    )
    os.close(writing)
    assert done.stdout == '{"answer": 1}\n'
