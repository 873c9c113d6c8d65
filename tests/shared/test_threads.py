"""Threads that do not die alone."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

import pytest

from fl_shared.errors import ConfigError
from fl_shared.runtime.threads import Loop, reason, running_pool


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("a patient's name"), "ZeroDivisionError"),
        (SystemExit(3), "SystemExit"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConfigError("the file is gone"), "the file is gone"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_whatever_a_turn_raises_the_next_one_follows(
    error: BaseException, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says meanwhile why, without an unknown error's words; after a good turn nothing is wrong any more."""
    turns: list[int] = []
    healed = threading.Event()

    def turn() -> float:
        turns.append(1)
        if not healed.is_set():
            raise error
        return 0.01

    loop = Loop("the test", turn, most_pause_s=0.01)
    loop.start()
    with caplog.at_level(logging.WARNING):
        wait_for(lambda: len(turns) > 1)
        assert loop.problem() == told
        healed.set()
        wait_for(lambda: not loop.problem())
        before = len(turns)
        wait_for(lambda: len(turns) > before + 2)
    loop.stop()
    assert f"the test: {told}" in caplog.text
    assert "patient" not in "".join(record.getMessage() for record in caplog.records)


def test_a_loop_that_is_done_or_was_stopped_has_no_problem() -> None:
    """None ends it in good order; `stop` does not wait out a pause."""
    done = Loop("done", lambda: None)
    done.start()
    wait_for(lambda: not done._thread.is_alive())
    assert done.problem() == ""
    lazy = Loop("lazy", lambda: 3600.0)
    assert lazy.problem() == ""  # not started
    lazy.start()
    lazy.stop(60)
    assert not lazy._thread.is_alive()


def test_a_thread_that_ends_although_nothing_may_end_it_is_told() -> None:
    """The last resort: a thread that is not there is a problem."""
    loop = Loop("the test", lambda: 3600.0)
    loop._run = lambda: None  # type: ignore[method-assign]  # as if the interpreter had ended it
    loop._thread = threading.Thread(target=loop._run)
    loop.start()
    wait_for(lambda: not loop._thread.is_alive())
    assert loop.problem() == "its thread has ended"


def test_a_pool_has_all_its_threads_before_it_is_needed() -> None:
    """What comes later needs no new thread."""
    pool = running_pool(3, "three")
    assert len([each for each in threading.enumerate() if each.name.startswith("three")]) == 3
    assert pool.submit(lambda: 7).result(60) == 7
    pool.shutdown()


def test_no_thread_to_be_had_is_a_message_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the interpreter says it when the system refuses."""

    def refuse(*_: object, **__: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse)
    if sys.version_info >= (3, 13):
        monkeypatch.setattr(threading, "_start_joinable_thread", refuse)
    for act in (Loop("the test", lambda: None).start, lambda: running_pool(2, "the test")):
        with pytest.raises(ConfigError, match="can't start new thread") as caught:
            act()
        assert "ulimit -u" in caught.value.fix


def test_reasons_name_no_path() -> None:
    """What is told goes to the untrusted half, too."""
    assert reason(FileNotFoundError(2, "No such file or directory", "/home/secret")) == "No such file or directory"
