"""Where a data set's budgets stand: what is charged to each, and what its gate would still grant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.ledger.reader import LedgerReader, filter_of
from fl_shared.ledger.records import BudgetRecord
from fl_shared.privacy.accounting.calibrate import noise_that_fits, steps_that_fit
from fl_shared.privacy.accounting.gate import Filter
from fl_shared.privacy.accounting.merge import Key, key_of
from fl_shared.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class Standing:
    """A budget that a run on the data set touches, with all that counts against it, open reservations included."""

    budget: BudgetRecord
    charged: Mapping[Key, int]

    @property
    def gate(self) -> Filter:
        """The filter that guards the budget."""
        return filter_of(self.budget)

    @property
    def name(self) -> str:
        """The budget in words."""
        return f"{self.budget.dataset}, {f'study {self.budget.study}' if self.budget.study else 'overall'}"

    def after(self, mechanism: Mechanism) -> dict[Key, int]:
        """Everything charged, and `mechanism`."""
        charged = dict(self.charged)
        charged[key_of(mechanism)] = charged.get(key_of(mechanism), 0) + mechanism.steps
        return charged

    def rounds_that_fit(self, mechanism: Mechanism) -> int:
        """How many more rounds of `mechanism` the budget's gate would grant."""
        return steps_that_fit(self.gate, self.charged, mechanism) // mechanism.steps

    def noise_for(self, sampling_probability: float, steps: int) -> float | None:
        """The least noise multiplier with which all these steps would be granted; None when no noise is enough."""
        try:
            return noise_that_fits(self.gate, self.charged, sampling_probability, steps)
        except ConfigError:  # the budget is full
            return None

    def is_valid(self, stamp: str) -> bool:
        """Whether grants may be made at this time (as the ledger writes it)."""
        return self.budget.is_valid(stamp)


def standings(ledger: LedgerReader, dataset: str, study: str | None) -> list[Standing]:
    """Return every budget that must agree to a run on `dataset`; LedgerError when there is none."""
    names = {dataset, *ledger.overlapping(dataset)}
    budgets = [
        Standing(budget, ledger.charges(budget.dataset, budget.study).together)
        for budget in ledger.budgets()
        if budget.dataset in names and budget.study in (None, study)
    ]
    own = {standing.budget.study for standing in budgets if standing.budget.dataset == dataset}
    if study not in own:
        raise LedgerError(
            f"data set {dataset!r} has no budget {f'for study {study!r}' if study else 'overall'}",
            fix="have the privacy officer set one",
        )
    return budgets
