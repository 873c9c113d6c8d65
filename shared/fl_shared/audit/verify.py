"""`fl-audit verify`: recompute chain, signatures, state, checkpoints and epsilon; trust nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fl_shared.audit.output import add_format, print_json
from fl_shared.audit.source import add_source, ledger_url, public_key
from fl_shared.errors import ConfigError
from fl_shared.ledger.verify import Checkpoint, Report, verify_ledger
from fl_shared.names import site_id

HELP = "is the record intact?"
BROKEN = 13


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    parser.add_argument(
        "--public-key", metavar="HEX|FILE", help="the site's key as you know it (default: HOME/keys/signing.pub)"
    )
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="N:HASH", help="a head that you noted before"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    add_format(parser, with_csv=False)


def run(arguments: argparse.Namespace) -> int:
    """Verify and print; exit code 13 when something is wrong."""
    report = verify_ledger(
        ledger_url(arguments),
        site_id(arguments.site),
        public_key=public_key(arguments),
        checkpoints=[parse_checkpoint(text) for text in arguments.checkpoint],
        processes=arguments.processes,
    )
    if arguments.json:
        print_json({**asdict(report), "intact": report.intact})
    else:
        _print(report)
    return 0 if report.intact else BROKEN


def parse_checkpoint(text: str) -> Checkpoint:
    """Return the checkpoint in `entries:hash`; raises ConfigError for anything else."""
    count, _, digest = text.partition(":")
    if not count.isdigit() or len(digest) != 64:
        raise ConfigError(f"checkpoint {text!r} is not usable", fix="write ENTRIES:HASH, e.g. from a receipt")
    return Checkpoint(int(count), digest.lower(), source=f"checkpoint {count}")


def _print(report: Report) -> None:
    for problem in report.problems:
        print(f"PROBLEM  {problem.message}")
    ended = ", ".join(f"{count} {outcome}" for outcome, count in report.settled.items())
    print(f"entries      {report.entries}, from {report.first} to {report.last}")
    print(f"head         {report.head}")
    print(f"merkle root  {report.merkle_root}")
    whose = "as you gave it" if report.pinned else "the ledger says so itself: pin it by --public-key"
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
