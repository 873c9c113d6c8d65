"""Fault points: die here, so that tests can show that a crash at any moment is safe.

`FL_FAULT=reserve.entry` kills the process with SIGKILL when it reaches that point for the first time,
`FL_FAULT=reserve.entry:3` for the third. Without the variable a fault point costs one dictionary look-up.
Whoever can set it can kill the process anyway, so it gives nobody a new power.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "FL_FAULT"
_passed: dict[str, int] = {}


def fault(point: str) -> None:
    """Kill this process if `FL_FAULT` names `point`."""
    configured = os.environ.get(VARIABLE)
    if not configured:
        return
    name, _, count = configured.partition(":")
    if name != point:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
