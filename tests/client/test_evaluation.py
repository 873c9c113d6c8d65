"""Evaluation on private hold-out units: bounded contributions, noise, a ledger row, and a way out of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_client.agent.evaluation import (
    _charged,
    _Request,
    figures_of,
    noisy_sums,
    require_enough,
    sensitivity_of,
    unit_vectors,
)
from fl_client.data.load import split_holdout
from fl_client.data.units import UnitData
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.tasks.classification import Classification
from fl_shared.errors import ConfigError, LedgerError, RunError
from fl_shared.identity.signing import open_document
from helpers.sites import SITE, Site, site_spec

LABELS = ("a", "b", "c")
TASK = Classification(LABELS, 8)
SENSITIVITY = sensitivity_of(TASK)


def data(units: int) -> UnitData:
    """Units of two records each."""
    owners = np.repeat(np.arange(units), 2)
    return UnitData(
        tuple(f"text {i}" for i in range(2 * units)), tuple(LABELS[i % 3] for i in owners), owners, units, "f"
    )


@given(st.lists(st.floats(width=32), min_size=12, max_size=12))
def test_a_units_contribution_is_bounded_whatever_the_logits_are(values: list[float]) -> None:
    """NaN and infinite logits included: each of the three parts lies in [0, 1]."""
    found = unit_vectors(TASK, np.array(values, np.float32).reshape(4, 3), data(2))
    assert found.shape == (2, 3)
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.linalg.norm(found, axis=1) <= SENSITIVITY).all()


def test_no_unit_makes_no_vector() -> None:
    """Held-out records may have none of a run's labels: the sums are then noise alone."""
    nobody = UnitData((), (), np.empty(0, np.int64), 0, "f")
    assert unit_vectors(TASK, np.zeros((0, 3), np.float32), nobody).shape == (0, 3)


def test_the_noise_has_the_charged_deviation() -> None:
    """The sample deviation of 3,000 draws is sigma sqrt(3) within 8 % (six standard errors), the mean is the sum."""
    vectors, stream = np.ones((50, 3)), SecureStream(bytes(32))
    draws = np.array([noisy_sums(vectors, 4.0, stream) for _ in range(1000)]).ravel()
    assert draws.std() == pytest.approx(4.0 * SENSITIVITY, rel=0.08)
    assert draws.mean() == pytest.approx(50.0, abs=1.0)


def test_too_few_units_give_no_figure() -> None:
    """A count that drowns in noise is not divided by."""
    assert figures_of(TASK, [5.0, 3.0, 1.0], 10.0)["accuracy"] is None
    assert figures_of(TASK, [1000.0, 800.0, 100.0], 10.0)["accuracy"] == pytest.approx(0.8)


def test_the_holdout_is_stable_and_disjoint(tmp_path: Path) -> None:
    """Both sides together are the data; a unit keeps its side when another one goes."""
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    training, held = split_holdout(data(200), 0.3, key)
    assert held is not None
    assert not set(training.texts) & set(held.texts)
    assert len(training.texts) + len(held.texts) == 400
    assert 20 < held.units < 110
    smaller, smaller_held = split_holdout(data(199), 0.3, key)
    assert smaller_held is not None
    assert set(smaller.texts) <= set(training.texts)
    assert set(smaller_held.texts) <= set(held.texts)


def test_figures_leave_only_with_a_settled_row_and_once(tmp_path: Path) -> None:
    """The row is charged with purpose evaluation; a repeat costs nothing; nothing else passes."""
    site = Site(tmp_path)
    request = _Request(site_spec(), b"adapter", 10.0)
    calls: list[int] = []

    def compute(_mechanism: Any) -> dict[str, Any]:
        calls.append(1)
        return figures_of(TASK, [100.0, 50.0, 20.0], 10.0)

    def ask() -> dict[str, Any]:
        return _charged(site.ledger, site.outgoing, _dataset(site), site.store, request, SITE, compute)

    first, again = ask(), ask()
    assert open_document(first, site.key.public_hex) == first["body"] == again["body"]
    assert len(calls) == 1
    (spend,) = site.ledger.spends()
    assert (spend.outcome, spend.reservation.purpose) == ("settled", "evaluation")
    assert site.ledger.epsilon("records").spent > 0
    entry = first["body"]["entry_id"]
    (path,) = (tmp_path / "releases").glob("*.figures")
    with pytest.raises(LedgerError):
        site.outgoing.evaluation(entry, SITE, request.run, path.read_bytes() + b" ")
    with pytest.raises(LedgerError):
        site.outgoing.evaluation(entry, SITE, "another", path.read_bytes())
    training = json.loads(site.order(site.manifest()).document)["body"]["entry_id"]
    with pytest.raises(LedgerError):
        site.outgoing.evaluation(training, SITE, "demo-1", path.read_bytes())


def test_a_failure_is_charged_in_full_and_shows_nothing(tmp_path: Path) -> None:
    """What fails after the reservation stays in doubt."""
    site = Site(tmp_path)

    def fail(_mechanism: Any) -> dict[str, Any]:
        raise ValueError("private")

    request = _Request(site_spec(), b"adapter", 10.0)
    with pytest.raises(ValueError, match="private"):
        _charged(site.ledger, site.outgoing, _dataset(site), site.store, request, SITE, fail)
    assert site.outcomes() == [(0, "in-doubt")]


def _dataset(site: Site) -> Any:
    (found,) = site.ledger.datasets()
    return found


def test_noise_that_would_hide_the_figures_is_refused_before_the_charge() -> None:
    """From public numbers alone; at the bound the figures are told in all but one of 700 evaluations."""
    with pytest.raises(ConfigError, match="60 units are held out") as refused:
        require_enough(TASK, 60.0, 10.0)
    assert "--noise 6.9" in refused.value.fix
    assert "--force" in refused.value.fix
    require_enough(TASK, 60.0, 6.9)
    lowest = 60.0 - 3.0 * 6.9 * SENSITIVITY  # three standard deviations below
    assert figures_of(TASK, [lowest, 10.0, 10.0], 6.9)["accuracy"] is not None


def test_a_failed_evaluation_is_not_repeated_until_it_is_confirmed(tmp_path: Path) -> None:
    """Its failure told something about the hold-out once."""
    site = Site(tmp_path)
    request = _Request(site_spec(), b"adapter", 10.0)

    def fail(_mechanism: Any) -> dict[str, Any]:
        raise RuntimeError("private")

    for error in (RuntimeError, RunError):
        with pytest.raises(error):
            _charged(site.ledger, site.outgoing, _dataset(site), site.store, request, SITE, fail)
    assert site.outcomes() == [(0, "in-doubt")]
