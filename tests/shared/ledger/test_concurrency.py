"""Many processes at once against one budget."""

from __future__ import annotations

import itertools

import pytest

from fl_shared.errors import BudgetExhausted
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import filter_of
from fl_shared.ledger.verify import verify_ledger
from fl_shared.privacy.accounting import steps_that_fit
from helpers.ledgers import ROUND, SITE, fork, opened, with_budget

PROCESSES = 64


def test_64_processes_never_overspend_and_lose_no_grant(url: str, key: SigningKey) -> None:
    """64 processes reserve and settle until refused: exactly what fits is granted, each grant once."""
    with opened(url, key) as ledger:
        icd = with_budget(ledger)
        fits = steps_that_fit(filter_of(ledger.budgets(icd)[0]), {}, ROUND) // ROUND.steps
    results = fork.SimpleQueue()
    start = fork.Barrier(PROCESSES)

    def work(number: int) -> None:
        granted = 0
        try:
            start.wait(60)
            with opened(url, key) as mine:
                for attempt in itertools.count():
                    held = mine.reserve("icd", ROUND, run=f"run-{number}", round=attempt)
                    mine.settle(held, ROUND, f"sha256:{number}-{attempt}")
                    granted += 1
        except BudgetExhausted:
            results.put((number, granted, None))
        except BaseException as error:  # noqa: BLE001  # the parent must hear of every end
            results.put((number, granted, repr(error)))

    workers = [fork.Process(target=work, args=(number,)) for number in range(PROCESSES)]
    for worker in workers:
        worker.start()
    ends = [results.get() for _ in workers]
    for worker in workers:
        worker.join(60)
    assert [error for _number, _granted, error in ends if error] == []
    granted = sum(count for _number, count, _error in ends)
    assert granted == fits
    with opened(url, key) as ledger:
        assert ledger.epsilon("icd").steps == granted * ROUND.steps
        assert len(list(ledger.spends())) == granted
        assert ledger.open_reservations() == []
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


def test_a_ledger_is_made_once(url: str, key: SigningKey) -> None:
    """Eight processes open a ledger that does not exist yet: it has one genesis and no error."""

    def work() -> None:
        opened(url, key).close()

    workers = [fork.Process(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    with opened(url, key) as ledger:
        assert ledger.head().entries == 1


@pytest.mark.parametrize("same", [True, False])
def test_two_processes_ask_for_the_same_round(url: str, key: SigningKey, same: bool) -> None:
    """Of two processes that reserve the same round at once, one is granted."""
    with opened(url, key) as ledger:
        with_budget(ledger)

    def work(number: int) -> None:
        with opened(url, key) as mine:
            mine.reserve("icd", ROUND, run="a", round=1 if same else number)

    workers = [fork.Process(target=work, args=(number,)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(worker.exitcode == 0 for worker in workers) == (1 if same else 2)
    with opened(url, key) as ledger:
        assert len(ledger.open_reservations()) == (1 if same else 2)
