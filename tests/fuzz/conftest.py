"""Two lengths of fuzzing: about a minute for all files in CI, or as long as one asks for.

In CI each test draws the same few hundred inputs every time, so the suite does not fail by chance. With
`CONCORDAT_FUZZ_MINUTES=10` each test goes on for ten minutes with new inputs. What was found once is kept in the
files, as `@example`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent
MINUTES = float(os.environ.get("CONCORDAT_FUZZ_MINUTES", "0"))
_SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile(
    "fuzz", max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=_SUPPRESSED
)
settings.register_profile(
    "fuzz-long", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_SUPPRESSED
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fuzz tests alone run under these profiles; one that is asked to go on for minutes is not ended for it."""
    for item in items:
        if HERE not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        if hasattr(item.obj, "hypothesis"):
            settings(settings.get_profile("fuzz-long" if MINUTES else "fuzz"))(item.obj)
        item.add_marker(pytest.mark.timeout(MINUTES * 60 + 600))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test again and again in the long profile."""
    if not MINUTES or HERE not in pyfuncitem.path.parents or not hasattr(pyfuncitem.obj, "hypothesis"):
        return None
    names = pyfuncitem._fixtureinfo.argnames  # pytest has no public name for it
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    over = time.monotonic() + MINUTES * 60
    while True:
        pyfuncitem.obj(**arguments)
        if time.monotonic() >= over:
            return True
