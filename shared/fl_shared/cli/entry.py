"""The one place where a command turns an error into a message and an exit code."""

from __future__ import annotations

import io
import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence

from fl_shared.cli.extras import missing_package
from fl_shared.errors import DEFECT, INTERRUPTED, READER_GONE, SYSTEM, ConcordatError, as_dict, printable


def cli_main(
    run: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, *, package: str = ""
) -> int:
    """Run a command; turn what it raises into one message on stderr and an exit code.

    `package`: which of ours it belongs to (`fl_client`), to name the extra that brings a missing package.

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
        return _print_error(error.message, error.fix, error.code, error.exit_code, as_json=as_json)
    except KeyboardInterrupt:
        return _print_error("interrupted", "", "interrupted", INTERRUPTED, as_json=as_json)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            # Point stdout elsewhere, so that the exit's flush stays quiet.
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), sys.stdout.fileno())
            return READER_GONE
        _trace()
        if isinstance(error, ConnectionError | TimeoutError):
            fix = "check that the other side runs, its address and the network"
            return _print_error(f"the connection failed: {error}", fix, "transport", 16, as_json=as_json)
        where = f"{error.filename}: " if error.filename is not None else ""
        fix = "check the path, its permissions and the free space"
        return _print_error(f"{where}{error.strerror or error}", fix, "system", SYSTEM, as_json=as_json)
    except Exception as error:  # noqa: BLE001  # the last line of defence: no traceback for a person
        _trace()
        if isinstance(error, ImportError):
            missing = missing_package(error, package)
            if missing is not None:
                return _print_error(missing.message, missing.fix, missing.code, missing.exit_code, as_json=as_json)
        fix = "this is a defect; run again with CONCORDAT_DEBUG=1 and report what it prints, with the log"
        return _print_error(f"internal error: {type(error).__name__}: {error}", fix, "defect", DEFECT, as_json=as_json)


def _print_error(message: str, fix: str, code: str, exit_code: int, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(as_dict(message, fix, code, exit_code)), file=sys.stderr)
        return exit_code
    defect_or_stop = exit_code in (DEFECT, INTERRUPTED)
    print(printable(message if defect_or_stop else f"error: {message}"), file=sys.stderr)
    if fix:
        print(printable(f"fix: {fix}"), file=sys.stderr)
    return exit_code


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
