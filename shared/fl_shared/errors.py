"""The one error family of Concordat, and the one place where a command turns an error into an exit code.

    ConcordatError              1   anything of ours that has no better name
    ├── ConfigError             2   a file, option or environment variable is wrong
    ├── PolicyRefusal          10   the site's policy says no
    ├── BudgetExhausted        11   the privacy budget says no
    ├── SignatureError         12   a signature, key or digest does not fit
    ├── LedgerError            13   the ledger cannot be read, written or trusted
    ├── ModelError             14   a model directory is unknown, broken or unsupported
    ├── DataError              15   a data file or a record is wrong
    ├── TransportError         16   the other side cannot be reached or broke off
    ├── EnrolmentError         17   a token or certificate is refused
    ├── RunError               18   a run cannot be launched, resumed or completed
    └── EngineError            19   the DP engine stopped before anything was released

Exit codes are stable; a retired number is not used again. Besides those above:

    0    success
    2    also wrong arguments (argparse)
    70   a defect of ours
    74   the operating system said no: permission, full disk, missing file
    130  Ctrl-C
    141  the reader of our output went away (`| head`), as a shell reports SIGPIPE
"""

from __future__ import annotations

import io
import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


class ConcordatError(Exception):
    """Something failed in a way that a person can act on.

    Args:
        message: names the value that is wrong.
        fix: the next step, as an instruction.
        code: a short stable word for machines, for example `budget-exhausted`.
    """

    exit_code = 1
    default_code = "error"

    def __init__(self, message: str, *, fix: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.code = code or self.default_code


class ConfigError(ConcordatError):
    """A file, option or environment variable is wrong."""

    exit_code = 2
    default_code = "config"


class PolicyRefusal(ConcordatError):
    """The site's policy forbids what was asked."""

    exit_code = 10
    default_code = "policy"


class BudgetExhausted(ConcordatError):
    """The mechanism asked for does not fit into what the budget has left."""

    exit_code = 11
    default_code = "budget-exhausted"


class SignatureError(ConcordatError):
    """A signature, key or digest does not fit."""

    exit_code = 12
    default_code = "signature"


class LedgerError(ConcordatError):
    """The ledger cannot be read, written or trusted."""

    exit_code = 13
    default_code = "ledger"


_DAMAGED_FIX = (
    "keep the database as it is and run fl-audit verify, which names each row; then restore the newest backup"
)


def damaged(what: str, *, fix: str = _DAMAGED_FIX, code: str = "ledger-damaged") -> LedgerError:
    """Return the error for a ledger whose record is damaged; `what` names entry and column."""
    return LedgerError(f"the record is damaged: {what}", fix=fix, code=code)


class ModelError(ConcordatError):
    """A model directory is unknown, broken or unsupported."""

    exit_code = 14
    default_code = "model"


class DataError(ConcordatError):
    """A data file or a record is wrong."""

    exit_code = 15
    default_code = "data"


class TransportError(ConcordatError):
    """The other side cannot be reached or broke off."""

    exit_code = 16
    default_code = "transport"


class EnrolmentError(ConcordatError):
    """A token or a certificate is refused."""

    exit_code = 17
    default_code = "enrolment"


class RunError(ConcordatError):
    """A run cannot be launched, resumed or completed."""

    exit_code = 18
    default_code = "run"


class EngineError(ConcordatError):
    """The DP engine stopped before anything was released."""

    exit_code = 19
    default_code = "engine"


DEFECT = 70
SYSTEM = 74
INTERRUPTED = 130
READER_GONE = 141


def cli_main(run: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; turn what it raises into one message on stderr and an exit code.

    With `--json` among the arguments the message is one JSON object (`error`, `fix`, `code`, `exit_code`).
    With `CONCORDAT_DEBUG=1` in the environment a defect of ours also prints its traceback.
    """
    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal or locale without a letter shows its number, as standard error does: what was done stays done.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(argv)
        sys.stdout.flush()  # here, not at the interpreter's exit, where a lost reader could not be handled
        return code
    except ConcordatError as error:
        return _tell(error.message, error.fix, error.code, error.exit_code, as_json=as_json)
    except KeyboardInterrupt:
        return _tell("interrupted", "", "interrupted", INTERRUPTED, as_json=as_json)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            # Point stdout elsewhere, so that the exit's flush stays quiet.
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), sys.stdout.fileno())
            return READER_GONE
        _trace()
        if isinstance(error, ConnectionError | TimeoutError):
            fix = "check that the other side runs, its address and the network"
            return _tell(f"the connection failed: {error}", fix, "transport", 16, as_json=as_json)
        where = f"{error.filename}: " if error.filename is not None else ""
        fix = "check the path, its permissions and the free space"
        return _tell(f"{where}{error.strerror or error}", fix, "system", SYSTEM, as_json=as_json)
    except Exception as error:  # noqa: BLE001  # the last line of defence: no traceback for a person
        _trace()
        if isinstance(error, ImportError):
            from fl_shared.cli.extras import missing_package  # which raises what this module defines

            missing = missing_package(error, run.__module__.partition(".")[0])
            if missing is not None:
                return _tell(missing.message, missing.fix, missing.code, missing.exit_code, as_json=as_json)
        fix = "this is a defect; run again with CONCORDAT_DEBUG=1 and report what it prints, with the log"
        return _tell(f"internal error: {type(error).__name__}: {error}", fix, "defect", DEFECT, as_json=as_json)


def _tell(message: str, fix: str, code: str, exit_code: int, *, as_json: bool) -> int:
    if as_json:
        table = {"error": message, "fix": fix, "code": code, "exit_code": exit_code}
        print(json.dumps(table), file=sys.stderr)
        return exit_code
    defect_or_stop = exit_code in (DEFECT, INTERRUPTED)
    print(printable(message if defect_or_stop else f"error: {message}"), file=sys.stderr)
    if fix:
        print(printable(f"fix: {fix}"), file=sys.stderr)
    return exit_code


def printable(text: str) -> str:
    """The text with control characters shown as escapes: what came over a network must not steer a terminal.

    Line breaks and tabs stay.
    """
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def shown(value: Any) -> str:
    """The value as a message shows it: at most about 120 characters."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _trace() -> None:
    if os.environ.get("CONCORDAT_DEBUG") == "1":
        traceback.print_exc()


def _reader_gone() -> bool:
    """Whether it is stdout that broke, and not another pipe or socket of the command."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False  # stdout is no file: a test captures it
