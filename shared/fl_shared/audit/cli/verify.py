"""`fl-audit verify`: recompute chain, signatures, state, checkpoints and epsilon; trust nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fl_shared.audit.checkpoints import parse_checkpoint, pins
from fl_shared.audit.source import add_source, home_key, public_key, reachable
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import add_json, add_quiet
from fl_shared.errors import ConfigError, printable
from fl_shared.ledger import Ledger, bundle, receipts
from fl_shared.ledger.reconcile import reconcile
from fl_shared.ledger.records import Problem
from fl_shared.ledger.verify import Checkpoint, Report, verify_ledger
from fl_shared.names import site_id

EXAMPLES = """
fl-audit verify --site hospital-001 --public-key signing.pub --receipts receipts.json
fl-audit verify hospital-001.zip --public-key signing.pub
"""
BROKEN = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="a file of fl-audit export, checked offline")
    add_source(parser, required=False)
    parser.add_argument(
        "--public-key",
        metavar="HEX|FILE",
        help="the site's key as you know it from the site, not from this ledger (default: HOME/keys/signing.pub)",
    )
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="N:HASH", help="a head that you noted before"
    )
    parser.add_argument(
        "--receipts", metavar="FILE|URL", help="the coordinator's receipts, each of which pins the ledger"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    add_quiet(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify and print; exit code 13 when something is wrong."""
    if arguments.bundle:
        arguments.ledger = arguments.bundle
        arguments.site = arguments.site or bundle.about(Path(arguments.bundle))["site"]
    if not arguments.site:
        raise ConfigError("no ledger is named", fix="give a bundle, or --site")
    site = site_id(arguments.site)
    stored = receipts.load(arguments.receipts, site) if arguments.receipts else []
    known = [parse_checkpoint(text) for text in arguments.checkpoint]
    if arguments.bundle:
        stored += bundle.receipts_in(Path(arguments.bundle))
        about = bundle.about(Path(arguments.bundle))
        known.append(Checkpoint(int(about["entries"]), str(about["head"]), str(about["merkle_root"]), "bundle.json"))
    given_key = public_key(arguments)
    beside = home_key(arguments) if given_key is None else None
    with working("verifying the ledger", quiet=arguments.quiet, json=arguments.json), reachable(arguments) as url:
        report = verify_ledger(
            url,
            site,
            public_key=given_key or beside,
            checkpoints=[*known, *pins(stored)],
            processes=arguments.processes,
        )
        if stored and report.intact:
            with Ledger.open(url, None, site) as ledger:
                divergences = reconcile(ledger, stored)
            report.problems += [
                Problem(divergence.message) for divergence in divergences if divergence.kind != "missing"
            ]
    report.pinned = given_key is not None  # what lies beside the ledger is not what the auditor knows
    if arguments.json:
        print_json({**asdict(report), "intact": report.intact, "receipts": len(stored)})
    else:
        _print(report, beside)
    return 0 if report.intact else BROKEN


def _print(report: Report, beside: str | None) -> None:
    for problem in report.problems:
        print(printable(f"PROBLEM  {problem.message}"))
    ended = ", ".join(f"{count} {outcome}" for outcome, count in report.settled.items())
    print(f"entries      {report.entries}, from {report.first} to {report.last}")
    print(f"head         {report.head}")
    print(f"merkle root  {report.merkle_root}")
    whose = "the ledger says so itself: pin it by --public-key"
    if report.pinned or beside:
        whose = "as you gave it" if report.pinned else "as its home says: pin what the site told you by --public-key"
    print(f"signed by    {report.key} ({whose})")
    print(f"reservations {report.reservations}: {ended}, {report.open} open")
    for row in report.budgets:
        print(
            f"budget       {row['dataset']} {row['study'] or 'overall'}: ceiling {row['epsilon']:g}, spent "
            f"{row['spent_rdp']:.4f} (Rényi) = {row['spent_pld']:.4f} (PLD) at delta {row['delta']:g}"
        )
    if not report.checkpoints:
        print("note         nothing kept elsewhere was given: entries cut off at the end would not show")
    print("INTACT" if report.intact else f"NOT INTACT: {len(report.problems)} problems")
