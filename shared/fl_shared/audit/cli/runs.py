"""`fl-audit runs`: each run's cost by itself, and what the data set had spent when it ended."""

from __future__ import annotations

import argparse

from fl_shared.audit.cli.tables import show_runs
from fl_shared.audit.costs import by_run
from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import print_csv, print_json
from fl_shared.cli.verbs import add_format

EXAMPLES = """
fl-audit runs --site hospital-001
fl-audit runs --site hospital-001 --csv > runs.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    parser.add_argument("--run", metavar="RUN", help="only this run")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the runs."""
    with open_ledger(arguments) as ledger:
        rows = by_run(ledger, list(ledger.spends()))
        rows = [row for row in rows if arguments.run in (None, row["run"])]
        if arguments.json:
            print_json({"site": ledger.site, "ledger": ledger.url, "runs": rows})
        elif arguments.csv:
            print_csv(rows)
        else:
            show_runs(f"Runs of {ledger.site}", rows)
    return 0
