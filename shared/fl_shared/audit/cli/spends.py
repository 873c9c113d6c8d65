"""`fl-audit spends`: what was done to the data, by which run, and what it cost."""

from __future__ import annotations

import argparse
from typing import Any

from fl_shared.audit.cli.tables import show_runs
from fl_shared.audit.costs import by_run
from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import print_csv, print_json, table
from fl_shared.cli.verbs import add_format
from fl_shared.ledger import Spend

EXAMPLES = """
fl-audit spends --site hospital-001
fl-audit spends --site hospital-001 --run demo --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    parser.add_argument("--run", metavar="RUN", help="only this run")
    parser.add_argument("--dataset", metavar="NAME", help="only this data set")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the spends."""
    with open_ledger(arguments) as ledger:
        spends = list(ledger.spends(run=arguments.run, dataset=arguments.dataset))
        rows = [spend_row(spend) for spend in spends if spend.charged is not None]
        if arguments.csv:
            print_csv(rows)
            return 0
        released = [spend_row(spend) for spend in spends if spend.charged is None]
        runs = by_run(ledger, spends)
        if arguments.json:
            print_json(
                {
                    "site": ledger.site,
                    "ledger": ledger.url,
                    "spends": rows,
                    "runs": runs,
                    "released": released,
                }
            )
        else:
            _print(ledger.site, rows, runs)
    return 0


def spend_row(spend: Spend) -> dict[str, Any]:
    """Return one spend as `--json` prints it; `mechanism` is what is charged."""
    reservation = spend.reservation
    return {
        "run": reservation.run,
        "round": reservation.round,
        "purpose": reservation.purpose,
        "attempt": reservation.attempt,
        "dataset": reservation.dataset,
        "dataset_version": reservation.dataset_version,
        "study": reservation.study,
        "outcome": spend.outcome,
        "mechanism": (spend.charged or reservation.mechanism).to_dict(),
        "steps_reserved": reservation.mechanism.steps,
        "release_digest": spend.release_digest,
        "reason": spend.reason,
        "reserved_at": reservation.created_at,
        "settled_at": spend.settled_at,
        "reservation_entry": reservation.seq,
        "settlement_entry": spend.settled_seq,
    }


def _print(site: str, rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    table(
        (
            "entry",
            "run",
            "round",
            "purpose",
            "data set",
            "outcome",
            "noise",
            "sampling",
            "steps",
            "clip",
            "at",
        ),
        [
            (
                str(row["settlement_entry"] or row["reservation_entry"]),
                row["run"],
                str(row["round"]),
                row["purpose"],
                row["dataset"],
                row["outcome"],
                f"{row['mechanism']['noise_multiplier']:g}",
                f"{row['mechanism']['sampling_probability']:g}",
                str(row["mechanism"]["steps"]),
                f"{row['mechanism']['clipping_norm']:g}",
                (row["settled_at"] or row["reserved_at"])[:19].replace("T", " "),
            )
            for row in rows
        ],
        title=f"Spends of {site}",
        right=("entry", "round", "noise", "sampling", "steps", "clip"),
    )
    show_runs("Each run by itself (the whole is less than the sum; see fl-audit budgets)", runs)
