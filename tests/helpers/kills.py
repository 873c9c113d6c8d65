"""kill -9 before every line of some code: a child of this process does the work and kills itself there."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any


def killed_at_every_line(
    work: Callable[[int], object], files: Sequence[str], *, prepare: Callable[[int], object]
) -> Iterator[int]:
    """Yield 1, 2, 3, … after a child has died before that line of `work`, until one has come to its end.

    Args:
        work: called in a child with the number; it must open what it needs itself.
        files: parts of paths; the lines in these files are counted.
        prepare: called here before each child.
    """
    number = 0
    while True:
        number += 1
        prepare(number)
        child = os.fork()
        if child == 0:
            _work_until(number, functools.partial(work, number), files)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            yield number
        elif os.waitstatus_to_exitcode(status) == 0:
            return
        else:
            raise AssertionError(f"the child of line {number} ended with {os.waitstatus_to_exitcode(status)}")


def _work_until(line: int, work: Callable[[], object], files: Sequence[str]) -> None:
    """Never returns: SIGKILL before the line, else status 0, or 1 after an exception."""
    seen = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal seen
        if not any(each in frame.f_code.co_filename for each in files):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    status = 1
    try:
        sys.settrace(trace)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # printed, and told by the status
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)
