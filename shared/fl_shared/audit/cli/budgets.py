"""`fl-audit budgets`: each ceiling, what is spent, reserved and left."""

from __future__ import annotations

import argparse
from typing import Any

from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import print_csv, print_json, table
from fl_shared.cli.verbs import add_format
from fl_shared.ledger import BudgetRecord, LedgerReader
from fl_shared.ledger.reader import position_of
from fl_shared.privacy.accounting.pld import steps_epsilon

EXAMPLES = """
fl-audit budgets --site hospital-001
fl-audit budgets --site hospital-001 --ledger hospital-001.zip --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the budgets."""
    with open_ledger(arguments) as ledger:
        rows = [budget_row(ledger, budget) for budget in ledger.budgets()]
        head = ledger.checkpoint()
        if arguments.json:
            print_json({"site": ledger.site, "ledger": ledger.url, "budgets": rows, "checkpoint": head})
        elif arguments.csv:
            print_csv(rows)
        else:
            _print(ledger, rows)
    return 0


def budget_row(ledger: LedgerReader, budget: BudgetRecord) -> dict[str, Any]:
    """Return one budget with its position, as `--json` prints it."""
    charges = ledger.charges(budget.dataset, budget.study)
    position = position_of(budget, charges)
    dataset = ledger.dataset(budget.dataset)
    return {
        "dataset": budget.dataset,
        "study": budget.study,
        "privacy_unit": dataset.privacy_unit,
        "units": dataset.units,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "spent": position.spent,
        "reserved": position.reserved,
        "left": position.left,
        "used": position.used,
        "spent_pld": steps_epsilon(charges.spent, budget.delta),
        "steps": position.steps,
        "accountant": position.accountant,
        "filter_order": budget.filter_order,
        "valid_from": budget.valid_from,
        "valid_to": budget.valid_to,
        "version": budget.version,
        "approver": budget.approver,
        "entry": budget.seq,
        "overlaps": ledger.overlapping(budget.dataset),
    }


def _print(ledger: LedgerReader, rows: list[dict[str, Any]]) -> None:
    table(
        (
            "data set",
            "study",
            "unit",
            "units",
            "ceiling",
            "spent",
            "reserved",
            "left",
            "gate",
            "PLD",
            "delta",
            "approver",
        ),
        [
            (
                row["dataset"],
                row["study"] or "overall",
                row["privacy_unit"],
                str(row["units"]),
                f"{row['epsilon']:g}",
                f"{row['spent']:.3f}",
                f"{row['reserved']:.3f}",
                f"{row['left']:.3f}",
                f"{row['used']:.0%}",
                f"{row['spent_pld']:.3f}",
                f"{row['delta']:g}",
                row["approver"],
            )
            for row in rows
        ],
        title=f"Budgets of {ledger.site}",
        right=("units", "ceiling", "spent", "reserved", "left", "gate", "PLD", "delta"),
    )
    print(
        "spent: epsilon by Rényi composition; gate: used share of the filter's bound, which decides;\n"
        "PLD: the same spends by privacy loss distributions, tighter, for parameters fixed in advance"
    )
