"""`fl-audit reconcile`: does the coordinator's copy agree with the site's ledger?"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import print_csv, print_json
from fl_shared.cli.verbs import add_format
from fl_shared.errors import ConfigError, printable
from fl_shared.ledger import receipts
from fl_shared.ledger.reconcile import reconcile

EXAMPLES = """
fl-audit reconcile --site hospital-001 --receipts receipts.json
"""
DIVERGED = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    parser.add_argument(
        "--receipts",
        metavar="FILE|URL",
        required=True,
        help="receipts.json as the coordinator exported it, a bundle, or the coordinator's database",
    )
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print each divergence; exit code 13 when there is one."""
    with open_ledger(arguments) as ledger:
        stored = receipts.load(arguments.receipts, ledger.site)
        divergences = reconcile(ledger, stored)
        releases = sum(spend.outcome == "settled" for spend in ledger.spends())
        site = ledger.site
    if not stored and not releases:
        raise ConfigError("neither the ledger nor the coordinator knows a release", fix="check --site and --receipts")
    if arguments.json:
        print_json(
            {
                "site": site,
                "agree": not divergences,
                "receipts": len(stored),
                "releases": releases,
                "divergences": [asdict(divergence) for divergence in divergences],
            }
        )
    elif arguments.csv:
        print_csv([asdict(divergence) for divergence in divergences])
    else:
        for divergence in divergences:
            print(printable(f"{divergence.kind.upper():<10} {divergence.message}"))
        print(f"{len(stored)} receipts, {releases} releases in the ledger of {site}")
        print("AGREE" if not divergences else f"DIVERGE: {len(divergences)} divergences")
    return DIVERGED if divergences else 0
