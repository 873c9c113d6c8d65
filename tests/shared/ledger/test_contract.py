"""What a ledger promises, on both databases."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_shared.errors import BudgetExhausted, ConfigError, LedgerError, SignatureError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger, merkle
from fl_shared.ledger.verify import verify_ledger
from fl_shared.privacy.accounting import pld_epsilon, rdp_epsilon
from fl_shared.privacy.mechanism import Mechanism
from helpers.ledgers import ROUND, SITE, Clock, charge_open, opened, release_of, story, with_budget


def steps(count: int) -> Mechanism:
    return dataclasses.replace(ROUND, steps=count)


def test_a_round_is_reserved_then_settled_and_costs_what_was_executed(ledger: Ledger) -> None:
    """An open reservation counts as reserved; the settlement charges the executed steps alone."""
    icd = with_budget(ledger)
    held = ledger.reserve(icd, ROUND, run="demo", round=1)
    before = ledger.epsilon(icd)
    assert (before.spent, before.steps) == (0.0, 0)
    assert before.reserved == pytest.approx(rdp_epsilon([ROUND], 1e-5))
    entry = ledger.settle(held, steps(5), "sha256:a")
    after = ledger.epsilon(icd)
    assert (after.reserved, after.steps) == (0.0, 5)
    assert after.spent == pytest.approx(rdp_epsilon([steps(5)], 1e-5))
    assert after.spent + after.left == pytest.approx(8.0)
    assert ledger.head().hash == entry.hash
    assert release_of(ledger, "demo", 1) == "sha256:a"
    assert release_of(ledger, "demo", 2) is None


def test_a_round_is_never_charged_twice(ledger: Ledger) -> None:
    """A second reservation of the same round, open or settled, is refused; a repeated settlement is the same."""
    icd = with_budget(ledger)
    held = ledger.reserve(icd, ROUND, run="demo", round=1)
    with pytest.raises(LedgerError, match="already open"):
        ledger.reserve(icd, ROUND, run="demo", round=1)
    entry = ledger.settle(held, ROUND, "sha256:a")
    assert ledger.settle(held, ROUND, "sha256:a") == entry
    with pytest.raises(LedgerError, match="already ended"):
        ledger.settle(held, ROUND, "sha256:b")
    with pytest.raises(LedgerError, match="already settled"):
        ledger.reserve(icd, ROUND, run="demo", round=1)
    ledger.reserve(icd, ROUND, run="demo", round=1, purpose="evaluation")
    assert ledger.epsilon(icd).steps == 8


@pytest.mark.parametrize(
    "executed",
    [
        dataclasses.replace(ROUND, noise_multiplier=0.9),
        dataclasses.replace(ROUND, sampling_probability=0.2),
        dataclasses.replace(ROUND, steps=9),
        dataclasses.replace(ROUND, clipping_norm=2.0),
    ],
)
def test_more_than_was_reserved_cannot_be_settled(ledger: Ledger, executed: Mechanism) -> None:
    """Less noise, more sampling, more steps or another clipping norm than reserved is refused."""
    held = ledger.reserve(with_budget(ledger), ROUND, run="demo", round=1)
    with pytest.raises(LedgerError, match="is not what entry"):
        ledger.settle(held, executed, "sha256:a")
    assert ledger.open_reservations() == [held]


def test_an_unused_reservation_is_given_back_and_the_round_may_be_tried_again(ledger: Ledger) -> None:
    """After a release with its proof nothing is charged, and the same round can be reserved once more."""
    icd = with_budget(ledger)
    held = ledger.reserve(icd, ROUND, run="demo", round=1)
    ledger.void(held, "the model could not be loaded")
    assert ledger.epsilon(icd).used == 0.0
    again = ledger.reserve(icd, ROUND, run="demo", round=1)
    assert again.attempt == 2
    with pytest.raises(LedgerError, match="already ended"):
        ledger.settle(held, ROUND, "sha256:a")


def test_what_is_in_doubt_is_charged_in_full(ledger: Ledger) -> None:
    """What a crash left open is charged in full, once."""
    icd = with_budget(ledger)
    ledger.reserve(icd, ROUND, run="demo", round=1)
    ledger.reserve(icd, ROUND, run="demo", round=2)
    found = charge_open(ledger)
    assert [(spend.reservation.round, spend.outcome) for spend in found] == [(1, "in-doubt"), (2, "in-doubt")]
    assert ledger.epsilon(icd).steps == 16
    assert charge_open(ledger) == []
    with pytest.raises(LedgerError, match="already in-doubt"):
        ledger.reserve(icd, ROUND, run="demo", round=1)
    assert ledger.reserve(icd, ROUND, run="demo", round=1, retry=True).attempt == 2


def test_the_ceiling_holds_and_the_refusal_costs_nothing(ledger: Ledger) -> None:
    """Rounds are granted until the gate is full; the refusal leaves no entry; a smaller one may still fit."""
    icd = with_budget(ledger)

    def go_on(number: int = 0) -> int:
        try:
            held = ledger.reserve(icd, ROUND, run="demo", round=number)
        except BudgetExhausted:
            return number
        ledger.settle(held, ROUND, f"sha256:{number}")
        return go_on(number + 1)

    granted = go_on()
    with pytest.raises(BudgetExhausted, match=r"of 'icd' .* would make it") as refusal:
        ledger.reserve(icd, ROUND, run="demo", round=granted)
    assert refusal.value.code == "budget-exhausted"
    position = ledger.epsilon(icd)
    assert position.steps == granted * 8
    assert 0.9 < position.used <= 1.0
    assert position.spent <= 8.0
    assert pld_epsilon([steps(granted * 8)], 1e-5) <= 8.0
    head = ledger.head()
    with pytest.raises(BudgetExhausted):
        ledger.reserve(icd, ROUND, run="demo", round=999)
    assert ledger.head() == head
    ledger.reserve(icd, steps(1), run="demo", round=999)


def test_every_budget_must_agree(ledger: Ledger) -> None:
    """A study's small budget refuses while the overall one has room, and the other way round."""
    icd = with_budget(ledger, epsilon=8.0)
    ledger.set_budget(icd, 4.0, 1e-5, "DPO", study="small")
    ledger.set_budget(icd, 100.0, 1e-5, "DPO", study="large")
    with pytest.raises(BudgetExhausted, match="study 'small'"):
        ledger.reserve(icd, steps(60), run="a", round=1, study="small")
    with pytest.raises(BudgetExhausted, match="no budget for study 'other'"):
        ledger.reserve(icd, ROUND, run="a", round=1, study="other")
    ledger.reserve(icd, steps(90), run="a", round=1, study="large")
    with pytest.raises(BudgetExhausted, match=r"^the budget of 'icd' \("):
        ledger.reserve(icd, steps(20), run="a", round=2, study="large")


def test_no_budget_means_no(ledger: Ledger) -> None:
    """A data set without a budget, or an unknown one, is never granted."""
    bare = ledger.register_dataset("bare", "sha256:bare", "record", 100, 1)
    with pytest.raises(BudgetExhausted, match="no budget overall"):
        ledger.reserve(bare, ROUND, run="a", round=1)
    with pytest.raises(LedgerError, match="not registered"):
        ledger.reserve("unknown", ROUND, run="a", round=1)
    with pytest.raises(LedgerError, match="0 budgets"):
        ledger.epsilon(bare)


def test_overlapping_data_sets_are_charged_together(ledger: Ledger) -> None:
    """What is spent on one of two overlapping data sets counts against both, past and future."""
    icd, notes = with_budget(ledger), with_budget(ledger, "notes")
    ledger.settle(ledger.reserve(icd, steps(50), run="a", round=1), steps(50), "sha256:a")
    assert ledger.epsilon(notes).steps == 0
    ledger.declare_overlap(notes, icd, "the same wards")
    ledger.declare_overlap(icd, notes, "said twice, written once")
    assert ledger.epsilon(notes).steps == 50
    with pytest.raises(BudgetExhausted):
        ledger.reserve(notes, steps(60), run="b", round=1)
    ledger.reserve(notes, steps(40), run="b", round=1)
    with pytest.raises(BudgetExhausted, match="'icd'"):
        ledger.reserve(icd, steps(20), run="a", round=2)


def test_a_changed_data_set_keeps_its_charges(ledger: Ledger) -> None:
    """A new fingerprint makes a new version of the same data set, on the same budget; the same one, none."""
    icd = with_budget(ledger)
    ledger.settle(ledger.reserve(icd, ROUND, run="a", round=1), ROUND, "sha256:a")
    assert ledger.register_dataset("icd", "sha256:icd", "record", 5000, 1) == icd
    changed = ledger.register_dataset("icd", "sha256:other", "record", 5001, 1)
    assert changed.version == 2
    assert ledger.epsilon(changed).steps == 8
    with pytest.raises(ConfigError, match="per record"):
        ledger.register_dataset("icd", "sha256:other", "patient", 5001, 1)


def test_a_top_up_is_a_new_entry_with_its_approver(ledger: Ledger) -> None:
    """A higher ceiling names who approved it; the filter's order stays; the same again writes nothing."""
    icd = with_budget(ledger)
    ledger.settle(ledger.reserve(icd, steps(90), run="a", round=1), steps(90), "sha256:a")
    first = ledger.budgets(icd)[0]
    head = ledger.head()
    assert ledger.set_budget(icd, 8.0, 1e-5, "DPO Jane Doe") == first
    assert ledger.head() == head
    raised = ledger.set_budget(icd, 12.0, 1e-5, "DPO John Roe")
    assert (raised.version, raised.approver, raised.filter_order) == (2, "DPO John Roe", first.filter_order)
    assert ledger.entry(raised.seq).body["approver"] == "DPO John Roe"
    ledger.reserve(icd, steps(40), run="a", round=2)


def test_a_budget_grants_only_in_its_period_and_never_renews(url: str, key: SigningKey) -> None:
    """Before and after its period a budget refuses; a new period does not forget what was spent."""
    clock = Clock()
    with opened(url, key, clock=clock) as ledger:
        icd = ledger.register_dataset("icd", "sha256:icd", "record", 5000, 1)
        start, end = clock.now + timedelta(days=1), clock.now + timedelta(days=2)
        ledger.set_budget(icd, 8.0, 1e-5, "DPO", valid_from=start, valid_to=end)
        with pytest.raises(BudgetExhausted, match="valid from"):
            ledger.reserve(icd, ROUND, run="a", round=1)
        clock.now = start
        ledger.settle(ledger.reserve(icd, steps(90), run="a", round=1), steps(90), "sha256:a")
        clock.now = end
        with pytest.raises(BudgetExhausted, match="valid from"):
            ledger.reserve(icd, steps(1), run="a", round=2)
        ledger.set_budget(icd, 8.0, 1e-5, "DPO", valid_from=end, valid_to=end + timedelta(days=365))
        with pytest.raises(BudgetExhausted, match="is used"):
            ledger.reserve(icd, steps(20), run="a", round=2)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan, 1e7])
def test_an_epsilon_that_is_no_ceiling_is_refused(ledger: Ledger, epsilon: float) -> None:
    """Zero, negative, infinite, not-a-number and absurd epsilons make no budget."""
    icd = ledger.register_dataset("icd", "sha256:icd", "record", 5000, 1)
    with pytest.raises(ConfigError, match="epsilon"):
        ledger.set_budget(icd, epsilon, 1e-5, "DPO")
    assert ledger.budgets() == []


@pytest.mark.parametrize("delta", [0.0, 1.0, 2e-4, 3e-4, -1e-5, math.nan])
def test_a_delta_of_one_in_n_is_refused(ledger: Ledger, delta: float) -> None:
    """With 5,000 units a delta of 1/5,000 or more, or none at all, makes no budget."""
    icd = ledger.register_dataset("icd", "sha256:icd", "record", 5000, 1)
    with pytest.raises(ConfigError, match="delta"):
        ledger.set_budget(icd, 8.0, delta, "DPO")
    assert ledger.budgets() == []


def test_a_data_set_that_shrank_below_one_over_delta_is_not_granted(ledger: Ledger) -> None:
    """When a new version has so few units that delta is 1/units or more, reservations are refused."""
    icd = with_budget(ledger)
    ledger.register_dataset("icd", "sha256:small", "record", 100_000, 1)
    with pytest.raises(ConfigError, match="delta"):
        ledger.reserve(icd, ROUND, run="a", round=1)


def test_unusable_words_are_refused(ledger: Ledger) -> None:
    """A budget without approver, a reservation without steps or names, a release without proof: refused."""
    icd = with_budget(ledger)
    with pytest.raises(ConfigError, match="approver"):
        ledger.set_budget(icd, 9.0, 1e-5, "")
    with pytest.raises(ConfigError, match="at least one step"):
        ledger.reserve(icd, steps(0), run="a", round=1)
    with pytest.raises(ConfigError, match="run ''"):
        ledger.reserve(icd, ROUND, run="", round=1)
    with pytest.raises(ConfigError, match="units 0"):
        ledger.register_dataset("x", "sha256:x", "record", 0, 1)
    held = ledger.reserve(icd, ROUND, run="a", round=1)
    for act in (ledger.void, ledger.charge_in_doubt):
        with pytest.raises(LedgerError, match="needs its"):
            act(held, "")
    with pytest.raises(LedgerError, match="digest"):
        ledger.settle(held, ROUND, "")
    with pytest.raises(LedgerError, match="no reservation"):
        ledger.settle(1, ROUND, "sha256:a")


def test_another_site_or_key_cannot_open_the_ledger(url: str, key: SigningKey) -> None:
    """Opening needs the site that it belongs to and the key that signed it; reading needs no key."""
    opened(url, key).close()
    with pytest.raises(LedgerError, match="belongs to site 'hospital-001'"):
        Ledger.open(url, key, "hospital-002")
    with pytest.raises(SignatureError, match="is signed by key"):
        opened(url, SigningKey.generate())
    with opened(url, None) as reader:
        assert reader.public_key() == key.public_hex
        with pytest.raises(LedgerError, match="open for reading"):
            reader.register_dataset("icd", "sha256:icd", "record", 1, 1)


def test_a_clock_that_jumps_back_stops_the_ledger(url: str, key: SigningKey) -> None:
    """A step back of minutes takes the last entry's time; a larger one is refused and nothing is written."""
    clock = Clock()
    with opened(url, key, clock=clock) as ledger:
        icd = with_budget(ledger)
        clock.now -= timedelta(minutes=2)
        held = ledger.reserve(icd, ROUND, run="a", round=1)
        clock.now -= timedelta(days=1)
        head = ledger.head()
        with pytest.raises(LedgerError, match="the clock says") as refusal:
            ledger.settle(held, ROUND, "sha256:a")
        assert refusal.value.code == "ledger-clock"
        assert ledger.head() == head
        clock.now = datetime(2028, 1, 1, tzinfo=UTC)
        ledger.settle(held, ROUND, "sha256:a")
    assert verify_ledger(url, SITE, public_key=key.public_hex).intact


def test_the_key_can_be_replaced_and_the_chain_goes_on(url: str, key: SigningKey) -> None:
    """After a rotation the new key signs, the old one no longer opens, and verification follows both."""
    fresh = SigningKey.generate()
    with opened(url, key) as ledger:
        icd = with_budget(ledger)
        ledger.rotate_key(fresh, "DPO Jane Doe", "yearly rotation")
        ledger.reserve(icd, ROUND, run="a", round=1)
    with pytest.raises(SignatureError):
        opened(url, key)
    opened(url, fresh).close()
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


def test_a_round_is_looked_up_and_not_searched_for(tmp_path: Path, key: SigningKey) -> None:
    """SQLite finds a round and a run by an index on the run: a grant does not slow down as the ledger grows."""
    with opened(f"sqlite:///{tmp_path / 'ledger.sqlite'}", key) as ledger:
        asked: list[tuple[str, Any]] = []
        sa.event.listen(
            ledger._store.engine, "before_cursor_execute", lambda *found: asked.append((found[2], found[3]))
        )
        story(ledger)
        list(ledger.spends(run="demo"))
        lookups = [each for each in asked if "LEFT OUTER JOIN settlements" in each[0] and "run = ?" in each[0]]
        assert len({statement for statement, _values in lookups}) == 2
        with ledger.reading() as connection:
            for statement, values in lookups:
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
                first = next(row[3] for row in plan if "reservations" in row[3])
                assert "run=?" in first, plan


def test_the_checkpoint_is_the_rfc_6962_root(ledger: Ledger) -> None:
    """The stored Merkle root is the recursive definition of RFC 6962 over all entry hashes, at every size."""
    import hashlib

    def root(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return hashlib.sha256(b"\0" + leaves[0]).digest()
        split = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + root(leaves[:split]) + root(leaves[split:])).digest()

    for number in range(1, 20):
        pinned = ledger.checkpoint()
        hashes = [bytes.fromhex(ledger.entry(seq).hash) for seq in range(1, pinned["entries"] + 1)]
        assert pinned["merkle_root"] == root(hashes).hex()
        assert pinned["head"] == hashes[-1].hex()
        ledger.register_dataset(f"set-{number}", f"sha256:{number}", "record", 10, 1)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=70))
def test_the_tree_in_memory_knows_its_peaks(leaves: list[bytes]) -> None:
    """The streaming tree has the peaks that its size demands."""
    tree = merkle.Tree()
    for leaf in leaves:
        tree.add(leaf.hex())
    assert [level for level, _node in tree.peaks] == [level for level, _at in merkle.peaks_of(len(leaves))]


def test_a_whole_story_verifies(url: str, key: SigningKey) -> None:
    """A ledger with a bit of everything is intact, and both accountants tell its budgets."""
    with opened(url, key) as ledger:
        story(ledger)
        position = ledger.epsilon("icd")
    report = verify_ledger(url, SITE, public_key=key.public_hex)
    assert report.problems == []
    assert report.open == 1
    assert report.settled == {"settled": 3, "released": 1, "in-doubt": 1}
    overall = next(row for row in report.budgets if row["dataset"] == "icd" and row["study"] is None)
    assert overall["spent_rdp"] == pytest.approx(position.spent)
    assert overall["spent_pld"] < overall["spent_rdp"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "settle", "release", "doubt", "recover"]),
            st.integers(0, 5),
            st.integers(1, 40),
        ),
        max_size=25,
    )
)
def test_any_sequence_of_acts_keeps_the_invariants(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int, int]]
) -> None:
    """Whatever is done in whatever order: never over the ceiling, sums are right, the ledger verifies."""
    address = f"sqlite:///{tmp_path_factory.mktemp('any') / 'ledger.sqlite'}"
    key = SigningKey.generate()
    charged = 0
    with opened(address, key) as ledger:
        icd = with_budget(ledger)
        held = []
        for act, choice, count in acts:
            try:
                if act == "reserve":
                    held.append(ledger.reserve(icd, steps(count), run="a", round=choice))
                elif act == "recover":
                    charged += sum(spend.reservation.mechanism.steps for spend in charge_open(ledger))
                elif held:
                    one = held[choice % len(held)]
                    if act == "settle":
                        executed = steps(min(count, one.mechanism.steps))
                        repeat = release_of(ledger, "a", one.round)
                        ledger.settle(one, executed, f"sha256:{one.seq}")
                        charged += 0 if repeat else executed.steps
                    elif act == "release":
                        ledger.void(one, "proof")
                    else:
                        fresh = one in ledger.open_reservations()
                        ledger.charge_in_doubt(one, "found open at start: its output may have left")
                        charged += one.mechanism.steps if fresh else 0
            except (LedgerError, BudgetExhausted):
                pass
            position = ledger.epsilon(icd)
            assert position.used <= 1.0
            assert position.steps == charged
    assert verify_ledger(address, SITE, public_key=key.public_hex, processes=1).problems == []
