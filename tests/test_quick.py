"""`--quick` leaves out what reaches a process or a model, by whatever way, and fails what starts one all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("processes")
HERE = Path(__file__).parent
MODULE = """
import os
import pytest
import helper

@pytest.fixture
def started():
    return helper.Starter()

@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    return request.param

def test_nothing():
    pass

def test_by_a_helper():
    helper.Starter().start()

def test_by_a_fixture(started):
    pass

def test_by_the_products_code(processes):
    pass

def test_database(database):
    assert database == "sqlite"

@pytest.mark.parametrize("number", range(100))
def test_many(number):
    pass
"""
HELPER = """
import subprocess

class Starter:
    def start(self):
        return subprocess.run(["true"])
"""
CAUGHT = """
import contextlib, os
import pytest

def test_a_process_all_the_same():
    with contextlib.suppress(RuntimeError):
        getattr(os, "".join(("f", "ork")))()

@pytest.fixture
def started():
    with contextlib.suppress(RuntimeError):
        getattr(os, "".join(("f", "ork")))()

def test_a_fixtures_process(started):
    pass
"""
CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from helpers import quick

quick.OURS = (*quick.OURS, {here!r})

def pytest_configure(config):
    config.pluginmanager.register(quick.Quick(), "quick")

import pytest

@pytest.fixture
def processes():
    pass
"""


def ran(pytester: pytest.Pytester, **files: str) -> pytest.RunResult:
    """A run of pytest of its own, in a process of its own: the hook stays in the interpreter."""
    pytester.makeconftest(CONFTEST.format(tests=str(HERE), here=str(pytester.path)))
    pytester.makepyfile(**files)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-v")


def test_what_starts_processes_is_left_out(pytester: pytest.Pytester) -> None:
    """By a helper's class, by a fixture, by a parameter, by the fixture that says so; five of a hundred cases stay."""
    done = ran(pytester, test_it=MODULE, helper=HELPER)
    done.assert_outcomes(passed=7, deselected=99)


def test_a_process_that_nobody_saw_coming_fails_the_test(pytester: pytest.Pytester) -> None:
    """Though the test swallows the refusal; nor does one that a fixture starts."""
    done = ran(pytester, test_it=CAUGHT)
    done.assert_outcomes(failed=1, errors=1)
    done.stdout.fnmatch_lines(["*must ask for the fixture `processes`*"])
