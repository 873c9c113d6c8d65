"""For all tests: hypothesis tries the same examples every time, so that a suite that passed passes again.

`--hypothesis-profile=default` draws new ones.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
