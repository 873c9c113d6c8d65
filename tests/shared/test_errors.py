"""`fl_shared.errors`: one message and one stable exit code for whatever a command raises."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fl_shared import errors
from fl_shared.cli.entry import cli_main
from fl_shared.errors import ConcordatError, printable

CODES = {
    "ConcordatError": 1,
    "ConfigError": 2,
    "PolicyRefusal": 10,
    "BudgetExhausted": 11,
    "SignatureError": 12,
    "LedgerError": 13,
    "ModelError": 14,
    "DataError": 15,
    "TransportError": 16,
    "EnrolmentError": 17,
    "RunError": 18,
    "EngineError": 19,
}
FAMILY = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ConcordatError)}


def raising(error: BaseException) -> Callable[[Sequence[str] | None], int]:
    def run(argv: Sequence[str] | None) -> int:
        raise error

    return run


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_exit_codes_are_the_documented_ones() -> None:
    """Every error class has the exit code that callers' scripts rely on, and the docstring says so."""
    assert {name: kind.exit_code for name, kind in FAMILY.items()} == CODES
    for name, code in CODES.items():
        line = next(each for each in str(errors.__doc__).splitlines() if name in each)
        assert str(code) in line.split()


def test_default_codes_differ() -> None:
    """A machine can tell the kinds apart by their short word alone."""
    assert len({kind.default_code for kind in FAMILY.values()}) == len(FAMILY)


@pytest.mark.parametrize("name", sorted(CODES))
def test_cli_main_prints_message_and_fix(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that fails prints error and fix to stderr, nothing to stdout, and returns the code."""
    assert cli_main(raising(FAMILY[name]("noise is 0", fix="write 1")), []) == CODES[name]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: noise is 0\nfix: write 1\n")


def test_cli_main_prints_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json the error is one JSON object on stderr, and stdout stays empty."""
    error = errors.BudgetExhausted("over", fix="wait", code="budget-exhausted")
    assert cli_main(raising(error), ["x", "--json"]) == 11
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": "over", "fix": "wait", "code": "budget-exhausted", "exit_code": 11}


def test_cli_main_returns_what_the_command_returns() -> None:
    """A command's own exit code passes through."""
    assert cli_main(lambda argv: len(argv or ()), ["a", "b", "c"]) == 3


def test_ctrl_c_gives_130(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends a command with 130 and one word."""
    assert cli_main(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_is_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected exception gives exit code 70 and no traceback, unless debugging is asked for."""
    monkeypatch.delenv("CONCORDAT_DEBUG", raising=False)
    assert cli_main(raising(ZeroDivisionError("x")), []) == 70
    err = capsys.readouterr().err
    assert err.startswith("internal error: ZeroDivisionError: x\nfix: ")
    assert "Traceback" not in err
    monkeypatch.setenv("CONCORDAT_DEBUG", "1")
    assert cli_main(raising(ZeroDivisionError("x")), []) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (PermissionError(13, "Permission denied", "/x/site.toml"), 74, "/x/site.toml: Permission denied"),
        (OSError(28, "No space left on device"), 74, "No space left on device"),
        (ConnectionRefusedError(111, "Connection refused"), 16, "Connection refused"),
        (BrokenPipeError(32, "Broken pipe"), 16, "Broken pipe"),
    ],
)
def test_what_the_system_refuses_is_no_defect(
    error: OSError, code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk, a forbidden file or a lost connection is named as such, with a fix."""
    assert cli_main(raising(error), []) == code
    err = capsys.readouterr().err
    assert named in err
    assert "fix: " in err
    assert "internal error" not in err


def test_letters_that_the_output_has_not_are_shown_by_number() -> None:
    """A name with an umlaut under an ASCII locale is no defect after the work was done; nor is half a character."""
    told = "import sys; from fl_shared.cli.entry import cli_main; cli_main(lambda _: print(sys.argv[1]), [])"
    for encoding, shown in (("ascii", "G\\xfc\\u2026"), ("latin-1", "G\xfc\\u2026"), ("utf-8", "G\xfc\u2026")):
        done = subprocess.run(
            [sys.executable, "-c", told, "G\xfc\u2026"],
            env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout.decode(encoding).strip(), done.stderr) == (0, shown, b"")


COMMAND = """
import sys
from fl_shared.cli.entry import cli_main

def run(argv):
    for number in range({lines}):
        print(number)
    return 0

sys.exit(cli_main(run, []))
"""


@pytest.mark.parametrize("lines", [1, 200_000])
def test_a_reader_that_goes_away_is_met_quietly(lines: int, tmp_path: Path) -> None:
    """`command | head` ends the command with 141 and an empty stderr, for little output and for much."""
    source = COMMAND.format(lines=lines)
    done = shell(
        '{ while [ ! -e "$D/gone" ]; do sleep 0.05; done; "$1" -c "$SOURCE"; echo "code $?" >&2; } |'
        ' { exec <&-; touch "$D/gone"; }',
        SOURCE=source,
        D=str(tmp_path),
    )
    assert done.stderr == "code 141\n"


def test_messages_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences in a message, which may have come over the network, are shown and not obeyed."""
    cli_main(raising(ConcordatError("site says \x1b[2J\x07ok\u202e é")), [])
    assert capsys.readouterr().err == "error: site says \\x1b[2J\\x07ok\\u202e é\n"
    assert printable("two\nlines\t—") == "two\nlines\t—"
