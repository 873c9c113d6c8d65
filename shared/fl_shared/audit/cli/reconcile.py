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
        kept = receipts.load(arguments.receipts, ledger.site)
        found = reconcile(ledger, kept)
        releases = sum(spend.outcome == "settled" for spend in ledger.spends())
        site = ledger.site
    if not kept and not releases:
        raise ConfigError("neither the ledger nor the coordinator knows a release", fix="check --site and --receipts")
    if arguments.json:
        print_json(
            {
                "site": site,
                "agree": not found,
                "receipts": len(kept),
                "releases": releases,
                "divergences": [asdict(each) for each in found],
            }
        )
    elif arguments.csv:
        print_csv([asdict(each) for each in found])
    else:
        for each in found:
            print(printable(f"{each.kind.upper():<10} {each.message}"))
        print(f"{len(kept)} receipts, {releases} releases in the ledger of {site}")
        print("AGREE" if not found else f"DIVERGE: {len(found)} divergences")
    return DIVERGED if found else 0
