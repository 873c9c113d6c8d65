"""What each run cost by itself, and what its data set had spent in all when it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_shared.ledger import LedgerReader, Spend
from fl_shared.privacy.accounting import pld_epsilon, rdp_epsilon
from fl_shared.privacy.accounting.merge import Key, key_of
from fl_shared.privacy.accounting.renyi import curve_epsilon
from fl_shared.privacy.mechanism import Mechanism


def by_run(ledger: LedgerReader, all_spends: Sequence[Spend]) -> list[dict[str, Any]]:
    """Return each run by itself, at the delta of its data set's budget, in order of first use.

    `cumulative` is epsilon of everything in `all_spends` that is charged to the data set, up to the run's last charge.
    """
    deltas = {budget.dataset: budget.delta for budget in reversed(ledger.budgets())}
    grouped: dict[tuple[str, str], list[Spend]] = {}
    for spend in all_spends:
        if spend.charged is not None:
            grouped.setdefault((spend.reservation.run, spend.reservation.dataset), []).append(spend)
    totals = _totals(ledger, all_spends, {max(map(_ended, spends)): place[1] for place, spends in grouped.items()})
    rows = []
    for (name, dataset), spends in grouped.items():
        mechanisms: list[Mechanism] = [spend.charged for spend in spends if spend.charged is not None]
        delta = deltas[dataset]
        rows.append(
            {
                "run": name,
                "dataset": dataset,
                "rounds": len({spend.reservation.round for spend in spends}),
                "steps": sum(mechanism.steps for mechanism in mechanisms),
                "epsilon": rdp_epsilon(mechanisms, delta),
                "epsilon_pld": pld_epsilon(mechanisms, delta),
                "delta": delta,
                "cumulative": curve_epsilon(totals[max(map(_ended, spends))], delta),
                "settled": sum(spend.outcome == "settled" for spend in spends),
                "in_doubt": sum(spend.outcome == "in-doubt" for spend in spends),
                "open": sum(spend.outcome == "open" for spend in spends),
                "first": spends[0].reservation.created_at,
                "last": spends[-1].settled_at or spends[-1].reservation.created_at,
            }
        )
    return rows


def _ended(spend: Spend) -> int:
    return spend.settled_seq or spend.reservation.seq


def _totals(ledger: LedgerReader, spends: Sequence[Spend], ends: dict[int, str]) -> dict[int, dict[Key, int]]:
    """Return what counted against a data set when the entry was written, for each (entry, data set) in `ends`."""
    names = {dataset: {dataset, *ledger.overlapping(dataset)} for dataset in set(ends.values())}
    charged: dict[str, dict[Key, int]] = {}
    totals = {}
    for spend in sorted((spend for spend in spends if spend.charged is not None), key=_ended):
        own = charged.setdefault(spend.reservation.dataset, {})
        if spend.charged is not None:
            own[key_of(spend.charged)] = own.get(key_of(spend.charged), 0) + spend.charged.steps
        dataset = ends.get(_ended(spend))
        if dataset is not None:
            merged: dict[Key, int] = {}
            for name in names[dataset]:
                for key, steps in charged.get(name, {}).items():
                    merged[key] = merged.get(key, 0) + steps
            totals[_ended(spend)] = merged
    return totals
