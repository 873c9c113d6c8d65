"""Runs that a site takes no further part in, as the ledger's own entries say."""

from __future__ import annotations

import pytest

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import (
    FAILED_REASON,
    MAX_BROKEN_OFF,
    MAX_FAILED_RUNS,
    Suspensions,
    confirm_run,
    note_computed_again,
)
from fl_shared.ledger.verify import verify_ledger
from fl_shared.privacy.mechanism import Mechanism
from helpers.ledgers import SITE, opened, with_budget

CHEAP = Mechanism(noise_multiplier=100.0, sampling_probability=0.01, steps=1, clipping_norm=1.0)


def _fail(ledger: Ledger, run: str, number: int = 1, reason: str = f"EngineError {FAILED_REASON}") -> None:
    ledger.charge_in_doubt(ledger.reserve("icd", CHEAP, run=run, round=number), reason)


def test_one_failure_suspends_its_run_until_it_is_confirmed(url: str, key: SigningKey) -> None:
    """It survives a new start; another reader sees it at once; the confirmation names who and why; all verifies."""
    with opened(url, key) as ledger:
        with_budget(ledger)
        watching = Suspensions(ledger)
        assert watching.of("demo") == ""
        _fail(ledger, "demo")
        assert FAILED_REASON in watching.of("demo")
        assert watching.of("other") == ""
    with opened(url, key) as ledger:
        found = Suspensions(ledger)
        assert list(found.all()) == ["demo"]
        with pytest.raises(LedgerError, match="not suspended"):
            confirm_run(ledger, "other", "officer", "why not")
        for name, reason in (("", "x"), ("x", ""), ("x" * 201, "x")):
            with pytest.raises(ConfigError):
                confirm_run(ledger, "demo", name, reason)
        entry = confirm_run(ledger, "demo", "A. Officer", "a broken disk was replaced")
        assert entry.kind == "witness"
        assert (entry.body["by"], entry.body["reason"]) == ("A. Officer", "a broken disk was replaced")
        assert found.all() == {} == Suspensions(ledger).all()
        _fail(ledger, "demo", 2)
        assert list(found.all()) == ["demo"]
        note_computed_again(ledger, ledger.reserve("icd", CHEAP, run="demo", round=3))
    report = verify_ledger(url, SITE, public_key=key.public_hex)
    assert report.problems == []


def test_what_broke_off_is_allowed_several_times(url: str, key: SigningKey) -> None:
    """Crashes and power cuts give no answer; ten of them in one run suspend it all the same."""
    with opened(url, key) as ledger:
        with_budget(ledger)
        found = Suspensions(ledger)
        for number in range(1, MAX_BROKEN_OFF):
            _fail(ledger, "demo", number, "broken off by a crash, and the run went on without it")
            assert found.of("demo") == ""
        note_computed_again(ledger, ledger.reserve("icd", CHEAP, run="demo", round=MAX_BROKEN_OFF))
        assert found.of("demo") != ""


def test_runs_by_the_dozen_do_not_buy_answers_by_the_dozen(url: str, key: SigningKey) -> None:
    """After three failed runs nobody has confirmed, no other run is taken part in either."""
    with opened(url, key) as ledger:
        with_budget(ledger)
        found = Suspensions(ledger)
        for number in range(MAX_FAILED_RUNS):
            assert found.of("fresh") == ""
            _fail(ledger, f"run-{number}")
        assert "run-0" in found.of("fresh")
        assert "fresh" not in found.all()
        confirm_run(ledger, "run-0", "officer", "seen")
        assert found.of("fresh") == ""


def test_the_same_data_under_another_name_are_recognised(url: str, key: SigningKey) -> None:
    """Equal fingerprints, of any version, are refused with the other name, unless both share what is spent."""
    with opened(url, key) as ledger:
        ledger.register_dataset("icd", "sha256:first", "patient", 100, 1)
        ledger.register_dataset("icd", "sha256:second", "patient", 101, 1)
        ledger.set_budget("icd", 2.0, 1e-5, "officer")
        for print_ in ("sha256:first", "sha256:second"):
            with pytest.raises(ConfigError, match="'icd'") as refused:
                ledger.register_dataset("again", print_, "patient", 100, 1)
            assert 'shares_units_with = ["icd"]' in refused.value.fix
        with pytest.raises(ConfigError, match="not registered"):
            ledger.register_dataset("again", "sha256:third", "patient", 100, 1, shares_with=["nobody"])
        with pytest.raises(ConfigError, match="per record"):
            ledger.register_dataset("again", "sha256:first", "record", 100, 1, shares_with=["icd"])
        before = ledger.head().entries
        ledger.register_dataset("again", "sha256:first", "patient", 100, 1, shares_with=["icd"])
        ledger.register_dataset("again", "sha256:first", "patient", 100, 1, shares_with=["icd"])
        assert ledger.head().entries == before + 2
        ledger.set_budget("again", 2.0, 1e-5, "officer")
        assert ledger.overlapping("again") == ["icd"]
        ledger.reserve("again", CHEAP, run="demo", round=1)
        assert ledger.epsilon("icd").reserved == ledger.epsilon("again").reserved > 0
        # A ledger from before this check: both names are there already, and the next start says so.
        ledger.register_dataset("late", "sha256:fourth", "patient", 100, 1)
        with pytest.raises(ConfigError, match="'icd'"):
            ledger.register_dataset("late", "sha256:second", "patient", 100, 1)
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []
