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

Exit codes are stable: 0 success, 2 also for wrong arguments, 70 a defect of ours, 130 Ctrl-C. A retired
number is not used again.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence


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
INTERRUPTED = 130


def cli_main(run: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; turn what it raises into one message on stderr and an exit code.

    With `CONCORDAT_DEBUG=1` in the environment a defect of ours also prints its traceback.
    """
    try:
        return run(argv)
    except ConcordatError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.fix:
            print(f"fix: {error.fix}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): point stdout elsewhere, so that the exit's flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  # the last line of defence: no traceback for a person
        if os.environ.get("CONCORDAT_DEBUG") == "1":
            traceback.print_exc()
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "fix: this is a defect; run again with CONCORDAT_DEBUG=1 and report what it prints",
            file=sys.stderr,
        )
        return DEFECT
