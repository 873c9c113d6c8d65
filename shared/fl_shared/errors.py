"""The one error family of Concordat, and the exit code that each error has.

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

from typing import Any

MAX_TEXT, MAX_CODE = 4000, 64
"""The most characters of message and fix, and of the code, that are taken from another party."""


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

    def to_dict(self) -> dict[str, Any]:
        """The one form in which an error crosses to another process: as JSON in a pipe, over HTTP or gRPC."""
        return as_dict(self.message, self.fix, self.code, self.exit_code)

    @staticmethod
    def from_dict(table: object) -> ConcordatError:
        """The error that `to_dict` wrote, of the same class; a number of no class makes a ConcordatError.

        What another party sent is cut to `MAX_TEXT` characters a field. `error` may be called `message`, as the control
        API calls it, and the exit code may be absent.

        Raises:
            ValueError: the table is none of an error.
        """
        if not isinstance(table, dict):
            raise ValueError("no table")
        message, fix, code = table.get("error", table.get("message")), table.get("fix", ""), table.get("code", "")
        if not all(isinstance(text, str) for text in (message, fix, code)):
            raise ValueError("no error")
        number = table.get("exit_code")
        kinds = [kind for kind in ConcordatError.__subclasses__() if kind.__module__ == __name__]
        kind = next((kind for kind in kinds if type(number) is int and kind.exit_code == number), ConcordatError)
        return kind(str(message)[:MAX_TEXT], fix=fix[:MAX_TEXT], code=code[:MAX_CODE])


def as_dict(message: str, fix: str, code: str, exit_code: int) -> dict[str, Any]:
    """The JSON fields of an error, in a person's order."""
    return {"error": message, "fix": fix, "code": code, "exit_code": exit_code}


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


def damaged(problem: str, *, fix: str = _DAMAGED_FIX, code: str = "ledger-damaged") -> LedgerError:
    """Return the error for a ledger whose record is damaged; `problem` names entry and column."""
    return LedgerError(f"the record is damaged: {problem}", fix=fix, code=code)


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


def printable(text: str) -> str:
    """The text with control characters shown as escapes: what came over a network must not steer a terminal.

    Line breaks and tabs stay.
    """
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def shown(value: Any) -> str:
    """The value as a message shows it: at most about 120 characters."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
