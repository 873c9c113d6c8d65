"""kill -9 at every fault point: nothing is overspent, nothing is charged twice, and the ledger goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from fl_shared.errors import SignatureError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.ledger.verify import verify_ledger
from helpers.ledgers import ROUND, SITE, charge_open, in_process, opened, release_of, with_budget

PLACES = ("begin", "before-entry", "entry", "tree", "row", "before-commit", "committed")
ENDS: dict[str, Callable[[Ledger, int], object]] = {
    "settle": lambda ledger, seq: ledger.settle(seq, ROUND, "sha256:release"),
    "release": lambda ledger, seq: ledger.void(seq, "the data file could not be opened"),
    "doubt": lambda ledger, seq: ledger.charge_in_doubt(seq, "the process died"),
}


def killed_at(point: str, url: str, key: SigningKey, act: Callable[[Ledger], object]) -> None:
    """Do `act` in another process, which dies at `point`."""

    def work() -> None:
        with opened(url, key) as ledger:
            act(ledger)

    assert in_process(work, {"FL_FAULT": point}) == -signal.SIGKILL, f"{point} was never reached"


@pytest.mark.parametrize("place", [*PLACES, "tally-key"])
def test_a_crash_while_reserving(url: str, key: SigningKey, place: str) -> None:
    """Killed around a reservation: it stands whole or not at all; if it stands, recovery charges it."""
    with opened(url, key) as ledger:
        with_budget(ledger)
    killed_at(f"reserve.{place}", url, key, lambda ledger: ledger.reserve("icd", ROUND, run="a", round=1))
    with opened(url, key) as ledger:
        stands = place == "committed"
        assert len(ledger.open_reservations()) == int(stands)
        assert len(charge_open(ledger)) == int(stands)
        assert ledger.epsilon("icd").steps == (8 if stands else 0)
        if not stands:
            ledger.settle(ledger.reserve("icd", ROUND, run="a", round=1), ROUND, "sha256:again")
            assert ledger.epsilon("icd").steps == 8
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ENDS)
def test_a_crash_while_ending(url: str, key: SigningKey, end: str, place: str) -> None:
    """Killed around an end: before the commit nothing left and recovery charges in full; after it, it stands.

    Epsilon charged is never below what may have left, and the release is charged once.
    """
    with opened(url, key) as ledger:
        seq = ledger.reserve(with_budget(ledger), ROUND, run="a", round=1).seq
    killed_at(f"{end}.{place}", url, key, lambda ledger: ENDS[end](ledger, seq))
    with opened(url, key) as ledger:
        ended = place == "committed"
        assert len(charge_open(ledger)) == int(not ended)
        steps = ledger.epsilon("icd").steps
        left = release_of(ledger, "a", 1)
        assert steps == (0 if ended and end == "release" else 8)
        assert (left is not None) == (ended and end == "settle")
        if left:
            assert ledger.settle(seq, ROUND, left).seq == ledger.head().entries
            assert ledger.epsilon("icd").steps == 8
        ledger.reserve("icd", ROUND, run="a", round=2)
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


def test_a_crash_while_the_ledger_is_made(url: str, key: SigningKey) -> None:
    """Killed in the middle of the first opening, the next opening finds an empty or a whole ledger."""
    for place in ("before-entry", "entry", "tree"):

        def work() -> None:
            opened(url, key)

        assert in_process(work, {"FL_FAULT": f"genesis.{place}"}) == -signal.SIGKILL
    with opened(url, key) as ledger:
        assert ledger.head().entries == 1
    assert verify_ledger(url, SITE).problems == []


REGISTRATIONS: dict[str, tuple[Callable[[Ledger], object], Callable[[Ledger], object]]] = {
    "dataset": (
        lambda ledger: ledger.register_dataset("new", "sha256:new", "record", 100, 1),
        lambda ledger: [dataset.name for dataset in ledger.datasets()],
    ),
    "budget": (lambda ledger: ledger.set_budget("icd", 9.0, 1e-5, "DPO"), lambda ledger: ledger.budgets("icd")),
    "overlap": (
        lambda ledger: ledger.declare_overlap("icd", "notes", "the same wards"),
        lambda ledger: ledger.overlapping("icd"),
    ),
}


@pytest.mark.parametrize("place", ["before-entry", "entry", "tree", "row", "committed"])
@pytest.mark.parametrize("kind", REGISTRATIONS)
def test_a_crash_while_registering(url: str, key: SigningKey, kind: str, place: str) -> None:
    """Killed around a data set, a top-up or an overlap: it stands whole or not at all, and can be done again."""
    act, view = REGISTRATIONS[kind]
    with opened(url, key) as ledger:
        with_budget(ledger)
        with_budget(ledger, "notes")
        before, entries = view(ledger), ledger.head().entries
    killed_at(f"{kind}.{place}", url, key, act)
    with opened(url, key) as ledger:
        assert (view(ledger) == before) == (place != "committed")
        act(ledger)
        assert view(ledger) != before
        assert ledger.head().entries == entries + 1
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


@pytest.mark.parametrize("place", ["before-entry", "entry", "tree", "row", "committed"])
def test_a_crash_while_a_note_is_made(url: str, key: SigningKey, place: str) -> None:
    """Killed around a witness entry: it is recorded whole or not at all."""
    with opened(url, key) as ledger:
        entries = ledger.head().entries
    killed_at(f"witness.{place}", url, key, lambda ledger: ledger.witness({"what": "note", "by": "DPO"}))
    with opened(url, key) as ledger:
        assert ledger.head().entries == entries + (place == "committed")
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


@pytest.mark.parametrize("place", ["before-entry", "entry", "tree", "row", "committed"])
def test_a_crash_while_the_key_is_replaced(url: str, key: SigningKey, place: str) -> None:
    """Killed around a rotation: one of the two keys opens the ledger, the other does not."""
    fresh = SigningKey.generate()
    opened(url, key).close()
    killed_at(f"key.{place}", url, key, lambda ledger: ledger.rotate_key(fresh, "DPO", "yearly"))
    right, wrong = (fresh, key) if place == "committed" else (key, fresh)
    with pytest.raises(SignatureError):
        opened(url, wrong)
    with opened(url, right) as ledger:
        with_budget(ledger)
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


def test_the_fault_points_are_all_of_them() -> None:
    """Each fault point in the ledger's source is driven by a test above."""
    import re
    from importlib import resources

    folder = resources.files("fl_shared.ledger")
    source = "".join((folder / f"{name}.py").read_text() for name in ("service", "writer", "chain", "registry"))
    found = re.findall(r"fault\(f?\"(\{point\}|[a-z]+)\.([a-z-]+)\"\)", source)
    assert {place for at, place in found if at in {"{point}", "reserve"}} == {*PLACES, "tally-key"}
    assert {at for at, _place in found} == {"{point}", "reserve", *REGISTRATIONS, "key", "witness"}
    assert {place for at, place in found if at in {*REGISTRATIONS, "key", "witness"}} == {"row", "committed"}
    assert source.count("fault(") == len(found)
