"""What the grant and the auditor's replay ask of a budget, by the same functions."""

from __future__ import annotations

import pytest

from fl_shared.ledger.records import in_period, is_small

FROM, TO = "2027-01-01T00:00:00.000000Z", "2028-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("at", "valid"),
    [
        ("2026-12-31T23:59:59.999999Z", False),
        (FROM, True),
        ("2027-12-31T23:59:59.999999Z", True),
        (TO, False),
    ],
)
def test_a_period_begins_with_its_first_moment_and_ends_just_before_its_last(at: str, valid: bool) -> None:
    """A side that is not set has no end."""
    assert in_period(at, FROM, TO) is valid
    assert in_period(at, None, None)
    assert in_period(at, FROM, None) is (at >= FROM)
    assert in_period(at, None, TO) is (at < TO)


def test_delta_must_be_below_one_over_units() -> None:
    """At 1/units one unit could be published outright; what is no number is not small."""
    assert is_small(0.0099, 100)
    assert not is_small(0.01, 100)
    assert not is_small(float("nan"), 100)
    assert not is_small(float("inf"), 1)
