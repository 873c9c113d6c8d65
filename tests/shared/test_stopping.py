"""A request to stop, set by signals at any instruction."""

from __future__ import annotations

import subprocess
import sys
import threading

from fl_shared.runtime.stopping import StopRequest

# In a process of its own: the test runner uses the same timer.
SIGNALS = """
import random, signal
from fl_shared.runtime import stopping
stopping._NAP_S = 2e-4
for number in range(2000):
    request = stopping.StopRequest()
    signal.signal(signal.SIGALRM, lambda *_: request.set())
    signal.setitimer(signal.ITIMER_REAL, random.Random(number).uniform(1e-6, 3e-4))
    assert request.wait()
print("heard")
"""


def test_a_signal_at_any_moment_is_heard() -> None:
    """A handler that sets the request never hangs the thread that waits, whenever the signal comes."""
    said = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, timeout=120, check=False)
    assert said.stdout.strip() == "heard", said.stderr


def test_a_request_stays() -> None:
    """It is set once and for all, and other threads see it."""
    request = StopRequest()
    assert not request.is_set()
    assert not request.wait(0.01)
    threading.Thread(target=request.set).start()
    assert request.wait(60.0)
    assert request.is_set()
    assert request.wait()
